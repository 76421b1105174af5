# shellcheck shell=bash
# How a command of mmrl_jax learns about the other processes of its run: the flags are known here
# and nowhere else.

# Sets full_command to run_command with these flags. Any other command than training and evaluation
# stays as it is.
#   add_distributed_flags auto                      JAX finds the processes: TPU pods, GKE, Slurm
#   add_distributed_flags flags ADDRESS COUNT ID    they are given: hosts that are reached by ssh
add_distributed_flags() {
    full_command=("${run_command[@]}")
    case " ${run_command[*]} " in
        *" -m experiments.train "* | *" -m experiments.evaluate "*) ;;
        *" mmrl-train "* | *" mmrl-evaluate "*) ;;
        *) return 0 ;;
    esac
    case $1 in
        auto) full_command+=(--distributed) ;;
        flags) full_command+=("--coordinator_address=$2" "--num_processes=$3" "--process_id=$4") ;;
    esac
}
