# shellcheck shell=bash
# Setting up hosts, and a run on them. The script that sources this file defines how they are reached:
#   on_hosts WHICH COMMAND       runs a shell command on a host, by its number, or on `all`
#   copy_to_hosts FILE           copies a file into the home directory of each host
#   launch_on_hosts DIGEST       starts run_command on all hosts, by `worker.sh launch`
#   after_setup                  is called when all hosts are set up
# and PLATFORM, tpu or gpu. On a host the code lies in ~/mmrl_jax and the record of a run in ~/mmrl_run.

WORKER="bash mmrl_jax/tpu_scripts/worker.sh"

# Sets report to a line `mmrl_host NAME SETUP STATE DIGEST` for each host; fails where one does not answer.
read_report() {
    local output
    # shellcheck disable=SC2016  # expanded on the host
    local command='if [ -f mmrl_jax/tpu_scripts/worker.sh ]; then '$WORKER' status; else echo "mmrl_host $(hostname) none none -"; fi'
    report=""
    output=$(on_hosts all "$command") || return 1
    is_true "$opt_dry_run" || report=$(grep '^mmrl_host ' <<<"$output")
}

# Succeeds if all hosts of the report are set up, with any commit.
are_set_up() {
    is_true "$opt_dry_run" || awk '$3 == "none" { missing = 1 } END { exit missing }' <<<"$report"
}

# Succeeds if all hosts of the report have the commit.
have_commit() {
    ! is_true "$opt_dry_run" &&
        awk -v key="$PLATFORM-$commit" '$3 != key { missing = 1 } END { exit missing }' <<<"$report"
}

# Identifies a command, so that the same one is not started twice.
command_digest() {
    printf '%s\0' "${run_command[@]}" | cksum | cut -d ' ' -f 1
}

# Prints the state of the run with a digest on all hosts of the report: none, running, succeeded,
# stopped, interrupted, failed; partly_running where some hosts run it and it has failed or is missing on
# others; other where another command is running. The hosts of one run end some seconds apart: until
# the last of them has ended, it is running.
run_state() {
    awk -v digest="$1" '
        $4 == "running" && $5 != digest { other = 1 }
        { states[$5 == digest ? $4 : "none"] = 1 }
        END {
            for (state in states) { count++; last = state }
            if (other) print "other"
            else if (count == 0) print "none"
            else if (count == 1) print last
            else if ("running" in states)
                print ("failed" in states || "none" in states) ? "partly_running" : "running"
            else if ("stopped" in states) print "stopped"
            else print "failed"
        }' <<<"$report"
}

# Copies the commit to all hosts and installs what it needs. Called from conditions, where `set -e`
# does not hold.
setup_hosts() {
    local file
    make_archive || return
    file=${archive##*/}
    copy_to_hosts "$archive" || return
    on_hosts all "mkdir -p mmrl_jax && tar -xzf $file -C mmrl_jax tpu_scripts && $WORKER setup $PLATFORM $PLATFORM-$commit $file" &&
        after_setup
}

# The command `setup`.
setup() {
    read_commit
    read_report || die "not every host answers; see the messages above."
    if have_commit; then
        say "All hosts have the commit ${commit:0:12} already."
        return
    fi
    case $report in
        *" running "*) die "a command is running; '${0##*/} stop' saves a checkpoint and stops it." ;;
    esac
    setup_hosts
    say "All hosts have the commit ${commit:0:12}."
}

# The command `launch`.
launch() {
    local digest
    digest=$(command_digest)
    read_report || die "not every host answers; see the messages above."
    are_set_up || die "a host is not set up: run '${0##*/} setup' first."
    case $(run_state "$digest") in
        running) say "The command is running already; '${0##*/} logs' follows it." && return ;;
        succeeded)
            if ! is_true "$opt_rerun"; then
                say "The command has ended with success; --rerun starts it again."
                return
            fi
            ;;
        other) die "another command is running; '${0##*/} stop' saves a checkpoint and stops it." ;;
        partly_running) die "only some hosts are running the command: '${0##*/} stop', then launch again." ;;
    esac
    launch_on_hosts "$digest"
    say "Launched. '${0##*/} logs' follows it; closing this terminal does not stop it."
}

stop() {
    on_hosts all "$WORKER stop $opt_grace_seconds true"
}

logs() {
    on_hosts "$opt_worker" "$WORKER logs $opt_lines $opt_follow"
}

print_report() {
    awk '{ sub(/^[a-z]*-/, "", $3); printf "%-28s code %-12.12s run %s\n", $2, $3, $4 }' <<<"$report"
}

# Takes the run one step towards its end, by the state of the hosts. Sets progress to finished,
# waiting (look again later), failed (it has to be launched again), stopped (by the user, after it was
# seen running) or unreachable. watched is set once the run has been seen running.
advance_run() {
    local digest
    digest=$(command_digest)
    progress=waiting
    if ! read_report; then
        progress=unreachable
        return
    fi
    if ! are_set_up; then
        setup_hosts || { progress=unreachable && return; }
        report=""
    fi
    case $(run_state "$digest") in
        none) launch_on_hosts "$digest" || progress=unreachable ;;
        running) watched=true ;;
        succeeded) progress=finished ;;
        stopped)
            # Before it was seen running, resume is the wish to continue what was stopped.
            if is_true "$watched"; then progress=stopped; else progress=failed; fi
            ;;
        other) die "another command is running; '${0##*/} stop' saves a checkpoint and stops it." ;;
        *) progress=failed ;;
    esac
}

# Counts an attempt and pauses: try_again COUNTER LIMIT REASON. COUNTER names a variable, LIMIT an
# option; beyond it, the script's give_up is called.
try_again() {
    local limit=opt_$2
    printf -v "$1" '%s' "$((${!1} + 1))"
    if [ "${!1}" -gt "${!limit}" ]; then give_up "$3, and --$2=${!limit} is reached."; fi
    say "$3. Attempt ${!1} of ${!limit} follows in $opt_cooldown_seconds s."
    sleep "$opt_cooldown_seconds"
}

# Launches a command again that has ended without success: relaunch COUNTER. What is left of it is
# stopped first. What fails here shows in the next report.
relaunch() {
    try_again "$1" max_relaunches "The command has failed or was interrupted ('${0##*/} logs' has the reason)"
    on_hosts all "$WORKER stop $opt_grace_seconds false" || true
    launch_on_hosts "$(command_digest)" || true
}
