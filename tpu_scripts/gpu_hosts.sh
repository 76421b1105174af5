#!/usr/bin/env bash
# Trains on one or several GPU hosts that are reached by ssh; one process of JAX drives all GPUs of a host.
#
#   gpu_hosts.sh setup                  copies the last commit to all hosts and installs the locked packages
#   gpu_hosts.sh launch -- COMMAND...   starts a command on all hosts; it outlives the ssh connection
#   gpu_hosts.sh logs                   follows the log of the first host, or of --worker=all
#   gpu_hosts.sh status                 prints the state of the command on each host
#   gpu_hosts.sh stop                   has the command save a checkpoint and end
#   gpu_hosts.sh resume -- COMMAND...   setup, and launch again after a failure until it has succeeded
#
# A file lists the hosts, one USER@HOST a line. They need the NVIDIA driver, bash, curl and flock, and
# ssh has to log in without a question. With several hosts, --workdir lies on gs:// or on a file system
# that all of them see. --dry_run prints what would be executed.
#

# shellcheck disable=SC2034  # options are also read by their names
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

opt_hosts=""  # File with the hosts.
opt_coordinator_address=""  # Address of the first host as the others see it; empty: its name in the file.
opt_coordinator_port=8476  # A free port of the first host.
opt_worker=0  # Host whose log is shown: its number in the file, from 0, or all.
opt_lines=100  # Lines of the log that are shown first.
opt_follow=true  # Follow the log until the command ends.
opt_rerun=false  # Launch a command that has succeeded before.
opt_max_relaunches=3  # Launches after a failure of the command.
opt_cooldown_seconds=60  # Pause before each of these.
opt_poll_seconds=30  # Pause between two looks at the hosts.
opt_grace_seconds=120  # Time that a command has after SIGTERM.
opt_env_file=$here/gpu_hosts.env  # File with options, one NAME=VALUE a line.
opt_dry_run=false  # Print the commands instead of executing them.

# shellcheck source=tpu_scripts/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=tpu_scripts/lib/checkout.sh
source "$here/lib/checkout.sh"
# shellcheck source=tpu_scripts/lib/distributed.sh
source "$here/lib/distributed.sh"
# shellcheck source=tpu_scripts/lib/hosts.sh
source "$here/lib/hosts.sh"

PLATFORM=gpu

read_hosts() {
    local line
    hosts=()
    [ -f "$opt_hosts" ] || die "--hosts: there is no file '$opt_hosts'."
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        line=${line//[[:space:]]/}
        if [ -n "$line" ]; then hosts+=("$line"); fi
    done <"$opt_hosts"
    [ "${#hosts[@]}" -gt 0 ] || die "--hosts: the file '$opt_hosts' names no host."
}

# Runs a command for several hosts at the same time: for_hosts FUNCTION NUMBER...; fails if one fails.
for_hosts() {
    local function=$1 number process processes="" failed=0
    shift
    for number in "$@"; do
        if is_true "$opt_dry_run"; then
            "$function" "$number"
        else
            "$function" "$number" &
            processes="$processes $!"
        fi
    done
    for process in $processes; do
        wait "$process" || failed=1
    done
    return "$failed"
}

# The functions that lib/hosts.sh builds on.

on_host() {
    run ssh -n -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=30 "${hosts[$1]}" "$host_command"
}

on_hosts() {
    host_command=$2
    if [ "$1" = all ]; then
        for_hosts on_host "${!hosts[@]}"
    else
        [[ $1 =~ ^[0-9]+$ ]] && [ "$1" -lt "${#hosts[@]}" ] ||
            die "--worker is '$1', and must be all or less than ${#hosts[@]}."
        on_host "$1"
    fi
}

copy_to_host() {
    run scp -q -o BatchMode=yes -o ConnectTimeout=20 "$host_file" "${hosts[$1]}:"
}

copy_to_hosts() {
    host_file=$1
    for_hosts copy_to_host "${!hosts[@]}"
}

launch_on_host() {
    if [ "${#hosts[@]}" -gt 1 ]; then
        add_distributed_flags flags "$coordinator" "${#hosts[@]}" "$1"
    else
        full_command=("${run_command[@]}")
    fi
    host_command="$WORKER launch $digest $(quote "${full_command[@]}")"
    on_host "$1"
}

launch_on_hosts() {
    digest=$1
    coordinator=${opt_coordinator_address:-${hosts[0]##*@}}:$opt_coordinator_port
    for_hosts launch_on_host "${!hosts[@]}"
}

after_setup() {
    :
}

give_up() {
    die "giving up: $1"
}

resume() {
    relaunches=0 unreachable=0 watched=false
    read_commit
    if is_true "$opt_dry_run"; then
        setup_hosts
        launch_on_hosts "$(command_digest)"
        return
    fi
    while :; do
        advance_run
        if [ "$progress" != unreachable ]; then unreachable=0; fi
        case $progress in
            finished) say "The command has succeeded." && return ;;
            stopped) say "The command was stopped." && return ;;
            failed) relaunch relaunches ;;
            unreachable) try_again unreachable max_relaunches "A host does not answer" ;;
        esac
        sleep "$opt_poll_seconds"
    done
}

status() {
    read_report || die "not every host answers; see the messages above."
    print_report
}

case ${1:-} in
    setup | launch | logs | status | stop | resume) verb=$1 && shift ;;
    help | --help | -h) usage && exit ;;
    *) die "'${1:-}' is not one of setup, launch, logs, status, stop, resume; see '${0##*/} --help'." ;;
esac
parse_options "$@"
require hosts
read_hosts
case $verb in
    setup) setup ;;
    launch | resume)
        require_run_command "$verb"
        "$verb"
        ;;
    *) "$verb" ;;
esac
