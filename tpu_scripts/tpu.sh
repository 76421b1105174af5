#!/usr/bin/env bash
# Trains on a Cloud TPU: one slice of any size, requested as a queued resource.
#
#   tpu.sh create                 requests the TPU and waits until it is there
#   tpu.sh setup                  copies the last commit to all workers and installs the locked packages
#   tpu.sh launch -- COMMAND...   starts a command on all workers; it outlives the ssh connection
#   tpu.sh logs                   follows the log of worker 0, or of --worker=all
#   tpu.sh status                 prints the states of the TPU and of the command
#   tpu.sh stop                   has the command save a checkpoint and end
#   tpu.sh resume -- COMMAND...   create, setup and launch until the command has succeeded: again after
#                                 each preemption, from the checkpoint in its --workdir=gs://...
#   tpu.sh delete                 deletes the TPU
#
# Each command does nothing where its work is done already. --dry_run prints what would be executed.
#

# shellcheck disable=SC2034  # options are also read by their names
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

opt_project=""  # Google Cloud project.
opt_zone=""  # Zone, for example us-west4-a.
opt_name=""  # Name of the TPU, and of its queued resource.
opt_accelerator_type=""  # Type with size, for example v5litepod-8 or v6e-256.
opt_runtime_version=""  # Software version of the TPU VM; empty: by the type.
opt_provisioning=spot  # One of spot, on-demand, reserved, flex-start.
opt_max_run_duration=24h  # Time after which the TPU is deleted, at most 7d.
opt_valid_until_duration=24h  # Time that the request may wait for a TPU.
opt_service_account=""  # Service account of the workers; empty: the default one of Compute Engine.
opt_network=""  # Network; empty: default.
opt_subnetwork=""  # Subnetwork; empty: by the network.
opt_internal_ips=false  # The workers get no external addresses, and ssh uses their internal ones.
opt_worker=0  # Worker whose log is shown: a number or all.
opt_lines=100  # Lines of the log that are shown first.
opt_follow=true  # Follow the log until the command ends.
opt_rerun=false  # Launch a command that has succeeded before.
opt_max_retries=10  # TPUs that resume requests after the first one.
opt_max_relaunches=3  # Launches on one TPU after a failure of the command.
opt_cooldown_seconds=60  # Pause before each of these.
opt_poll_seconds=30  # Pause between two looks at the state.
opt_grace_seconds=120  # Time that a command has after SIGTERM.
opt_delete_when_done=false  # resume deletes the TPU at its end, also when it gives up.
opt_env_file=$here/tpu.env  # File with options; see tpu.env.example.
opt_yes=false  # Agree to the cost without being asked.
opt_dry_run=false  # Print the commands instead of executing them.

# shellcheck source=tpu_scripts/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=tpu_scripts/lib/checkout.sh
source "$here/lib/checkout.sh"
# shellcheck source=tpu_scripts/lib/accelerators.sh
source "$here/lib/accelerators.sh"
# shellcheck source=tpu_scripts/lib/distributed.sh
source "$here/lib/distributed.sh"
# shellcheck source=tpu_scripts/lib/hosts.sh
source "$here/lib/hosts.sh"
# shellcheck source=tpu_scripts/lib/queued_resource.sh
source "$here/lib/queued_resource.sh"

PLATFORM=tpu

# The functions that lib/hosts.sh builds on.

tpu_vm() {
    local verb=$1
    shift
    if is_true "$opt_internal_ips"; then set -- "$@" --internal-ip; fi
    run gcloud compute tpus tpu-vm "$verb" "$@" "--project=$opt_project" "--zone=$opt_zone" --quiet
}

# What is not known is not deleted.
node_state() {
    gcloud compute tpus tpu-vm describe "$opt_name" "--project=$opt_project" "--zone=$opt_zone" \
        '--format=value(state)' || echo READY
}

on_hosts() {
    tpu_vm ssh "$opt_name" "--worker=$1" "--command=$2"
}

copy_to_hosts() {
    tpu_vm scp "$1" "$opt_name:" --worker=all
}

launch_on_hosts() {
    add_distributed_flags auto
    on_hosts all "$WORKER launch $1 $(quote "${full_command[@]}")"
}

# The timer is no part of the API: its absence would be noticed on the bill alone.
after_setup() {
    if [ "$opt_provisioning" = flex-start ]; then return; fi
    on_hosts 0 "systemctl is-active --quiet mmrl-deadline.timer" ||
        say "Warning: worker 0 has no timer that deletes $opt_name after $opt_max_run_duration;" \
            "delete it yourself ('sudo journalctl -u google-startup-scripts' on worker 0 has the reason)."
}

check_options() {
    local seconds
    require project zone name accelerator_type
    read_accelerator accelerator_type "$opt_accelerator_type"
    [ "$default_runtime" != - ] ||
        die "$opt_accelerator_type is not offered by the Cloud TPU API, only through GKE: use xpk.sh."
    case $opt_provisioning in
        spot | on-demand | reserved | flex-start) ;;
        *) die "--provisioning is '$opt_provisioning', and must be spot, on-demand, reserved or flex-start." ;;
    esac
    seconds=$(seconds_of valid_until_duration)
    seconds=$(seconds_of max_run_duration)
    [ "$seconds" -le $((7 * 86400)) ] ||
        die "--max_run_duration is '$opt_max_run_duration', and may be at most 7d."
}

create() {
    check_options
    read_queued_state || die "nothing was created."
    case $queued_state in
        ACTIVE) say "$opt_name is there already." && return ;;
        ABSENT | UNKNOWN)
            confirm_cost 1
            request_queued_resource
            ;;
    esac
    if ! wait_until_active; then
        case $queued_state in
            FAILED) die "the request for $opt_name has failed: $(failure_reason)" \
                "Remove it with 'tpu.sh delete' before you create it again." ;;
            *) die "$opt_name is $queued_state and cannot be used." \
                "Remove it with 'tpu.sh delete', or let 'tpu.sh resume' replace it." ;;
        esac
    fi
    say "$opt_name is ready, until you delete it or for $opt_max_run_duration: $(cost_per_hour)."
}

status() {
    read_queued_state || exit
    say "$opt_name: $queued_state, $(cost_per_hour) while it is ACTIVE"
    case $queued_state in
        ACTIVE | UNKNOWN) ;;
        FAILED) failure_reason && return ;;
        *) return ;;
    esac
    read_report || die "not every worker answers; see the messages above."
    print_report
}

delete() {
    read_queued_state || exit
    if [ "$queued_state" = ABSENT ]; then
        say "$opt_name does not exist."
        return
    fi
    delete_queued_resource
    say "$opt_name is deleted."
}

# Leaves the loop of resume: end_of_resume MESSAGE.
end_of_resume() {
    if is_true "$opt_delete_when_done"; then
        # The log lies on the workers.
        opt_follow=false
        opt_worker=all
        logs || true
        delete_queued_resource
        say "$1 $opt_name is deleted."
    else
        say "$1 $opt_name still costs money; 'tpu.sh delete' deletes it."
    fi
}

give_up() {
    end_of_resume "Giving up: $1" >&2
    exit 1
}

# Counts a retry and deletes the TPU; the next turn of the loop requests a new one.
remove_for_retry() {
    try_again retries max_retries "$1"
    delete_queued_resource || return 0
    may_request=true relaunches=0 unreachable=0
}

# One turn of resume on a TPU that is there.
advance_on_tpu() {
    advance_run
    if [ "$progress" != unreachable ]; then unreachable=0; fi
    case $progress in
        finished)
            end_of_resume "The command has succeeded."
            exit
            ;;
        stopped)
            end_of_resume "The command was stopped."
            exit
            ;;
        failed) relaunch relaunches ;;
        unreachable)
            unreachable=$((unreachable + 1))
            # Mostly a preemption that the queued resource does not show yet. Of a TPU that is READY only
            # the way to it may be broken, and its run is not ended for that.
            if [ "$unreachable" -ge 5 ] && [ "$(node_state)" != READY ]; then
                remove_for_retry "The workers of $opt_name do not answer"
            fi
            ;;
    esac
}

# Each turn looks at the state and does the one step that is due, so that resume itself can be
# interrupted and started again. A state that cannot be read (a laptop that sleeps) is read again.
resume() {
    local last=""
    may_request=true retries=0 relaunches=0 unreachable=0 watched=false
    read_commit
    confirm_cost $((opt_max_retries + 1))
    while :; do
        read_queued_state || queued_state=UNREADABLE
        if [ "$queued_state" != "$last" ]; then say "$opt_name: $queued_state"; fi
        last=$queued_state
        case $queued_state in
            ABSENT)
                is_true "$may_request" || die "$opt_name has been deleted, by you or after" \
                    "--max_run_duration. 'tpu.sh resume' with the same command requests a new one."
                request_queued_resource ||
                    try_again retries max_retries "The request for $opt_name was refused"
                ;;
            FAILED)
                may_request=false
                remove_for_retry "The request for $opt_name has failed: $(failure_reason)"
                ;;
            SUSPENDED)
                may_request=false
                # A TPU of flex-start is not preempted; it is suspended when its time is over.
                [ "$opt_provisioning" != flex-start ] ||
                    give_up "$opt_name has run for $opt_max_run_duration."
                remove_for_retry "$opt_name has been preempted"
                ;;
            ACTIVE)
                may_request=false
                advance_on_tpu
                ;;
        esac
        sleep "$opt_poll_seconds"
    done
}

# The commands of one preemption, in their order.
print_resume() {
    read_commit
    confirm_cost $((opt_max_retries + 1))
    read_queued_state
    delete_queued_resource
    request_queued_resource
    wait_until_active
    setup_hosts
    launch_on_hosts "$(command_digest)"
}

case ${1:-} in
    create | setup | launch | logs | status | stop | resume | delete) verb=$1 && shift ;;
    help | --help | -h) usage && exit ;;
    *) die "'${1:-}' is not one of create, setup, launch, logs, status, stop, resume, delete; see '${0##*/} --help'." ;;
esac
parse_options "$@"
require project zone name
case $verb in
    launch | resume)
        require_run_command "$verb"
        check_workdir "the TPU"
        if [ "$verb" = launch ]; then
            launch
        else
            check_options
            if is_true "$opt_dry_run"; then print_resume; else resume; fi
        fi
        ;;
    status)
        check_options
        status
        ;;
    *) "$verb" ;;
esac
