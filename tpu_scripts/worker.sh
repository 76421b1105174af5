#!/usr/bin/env bash
# Runs on a host, called by tpu.sh and gpu_hosts.sh through ssh, and in the containers of xpk.sh:
#
#   worker.sh setup PLATFORM KEY ARCHIVE  installs ~/ARCHIVE, a commit, over the one of before; KEY names it
#   worker.sh launch DIGEST COMMAND...    starts a command that outlives the ssh connection
#   worker.sh status                 prints: mmrl_host NAME KEY STATE DIGEST
#   worker.sh stop SECONDS MARK      SIGTERM, on which a run saves a checkpoint; after SECONDS SIGKILL.
#                                    With the MARK true, the command counts as stopped by the user
#   worker.sh logs LINES FOLLOW      prints the log, and follows it until the command ends
#   worker.sh foreground COMMAND...  runs a command; exit code 143 if SIGTERM has interrupted it
#
# ~/mmrl_run records the one command of a host: digest, pid, log.txt, stop, and outcome once it has ended.
# A process holds a lock on ~/mmrl_run/lock while it runs. A lock cannot outlive its process, as a pid
# file does when the host restarts.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P)
record=$HOME/mmrl_run
stamp=$root/.setup_key
export PATH="$HOME/.local/bin:$PATH"

fail() {
    printf '%s: %s\n' "$(hostname)" "$*" >&2
    exit 1
}

# Prints none, running, succeeded, failed, stopped (by the user) or interrupted (by another SIGTERM, as
# when the host shuts down).
state() {
    if [ ! -f "$record/digest" ]; then
        echo none
    elif [ -f "$record/outcome" ]; then
        ended "$(cat "$record/outcome")"
    elif flock --shared --nonblock "$record/lock" true; then
        ended unknown # The process was killed, or the host has restarted.
    else
        echo running
    fi
}

ended() {
    if [ "$1" = 0 ]; then
        echo succeeded
    elif [ -f "$record/stop" ]; then
        echo stopped
    elif [ "$1" = interrupted ]; then
        echo interrupted
    else
        echo failed
    fi
}

setup() {
    local platform=$1 key=$2 archive=$HOME/$3 python
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
    [ "$(state)" != running ] || fail "a command is running; stop it before the setup."
    rm -f "$stamp"
    cd "$root"
    # Only files of the previous commit are removed: a run may have written into the directory too.
    touch .archive
    grep -v '/$' .archive | tr '\n' '\0' | xargs -0 rm -f -- || true
    tar -xzf "$archive"
    tar -tzf "$archive" >.archive
    rm "$archive"
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    # TPU VMs come with Python 3.10.
    python=$(uv python find 3.12 2>/dev/null || uv python find 3.11 2>/dev/null) || {
        uv python install 3.12
        python=$(uv python find 3.12)
    }
    # shellcheck source=tpu_scripts/lib/packages.sh
    source tpu_scripts/lib/packages.sh
    PYTHON=$python sh tools/bootstrap.sh
    install_accelerator_packages "$root/.venv/bin/python" "$platform"
    echo "$key" >"$stamp"
}

launch() {
    local digest=$1
    shift
    mkdir -p "$record"
    : >>"$record/lock"
    [ "$(state)" != running ] || fail "a command is running already."
    rm -f "$record/outcome" "$record/pid" "$record/stop"
    echo "$digest" >"$record/digest"
    printf '== %s %s: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(hostname)" "$*" >>"$record/log.txt"
    setsid nohup bash "$0" detached "$@" </dev/null >>"$record/log.txt" 2>&1 &
    # Until it holds the lock, a status would say that it has failed.
    for _ in {1..100}; do
        if [ -f "$record/pid" ]; then return; fi
        sleep 0.1
    done
    fail "the command did not start within 10 s; see $record/log.txt"
}

# What launch starts.
detached() {
    local status=0
    # The command inherits the lock: while a child of it lives, the host counts as busy.
    exec 9>>"$record/lock"
    flock --timeout 5 9 # A status may be looking at it.
    echo $$ >"$record/pid"
    foreground "$@" || status=$?
    # What the command has left behind would keep the accelerator.
    trap '' TERM
    kill -TERM -- "-$$"
    if [ "$status" = 143 ]; then status=interrupted; fi
    echo "$status" >"$record/outcome"
}

# An interrupted run saves a checkpoint and exits with 143, but another command may exit with 0. So the
# signal itself decides: 143 makes Kubernetes, and our own loops, launch the command again.
foreground() {
    local child status interrupted=false
    cd "$root"
    if [ -d .venv ]; then export PATH="$root/.venv/bin:$PATH"; fi
    "$@" &
    child=$!
    trap 'interrupted=true; kill -TERM "$child" 2>/dev/null || true' TERM INT
    while :; do
        status=0
        wait "$child" || status=$?
        # A signal also ends `wait`; the child may then still be saving.
        kill -0 "$child" 2>/dev/null || break
    done
    trap - TERM INT
    if $interrupted; then status=143; fi
    return "$status"
}

stop() {
    local deadline=$((SECONDS + $1)) pid
    if [ "$(state)" != running ]; then
        echo "$(hostname): nothing is running"
        return
    fi
    pid=$(cat "$record/pid")
    if [ "$2" = true ]; then touch "$record/stop"; fi
    kill -TERM "$pid"
    while [ "$(state)" = running ]; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "$(hostname): no end after SIGTERM; killing it"
            kill -KILL -- "-$pid"
            return
        fi
        sleep 0.2
    done
    echo "$(hostname): stopped"
}

logs() {
    local lines=$1 follow=$2 label
    label=$(hostname)
    # The hosts of a TPU are named t1v-n-0123abcd-w-0.
    case $label in *-w-*) label="worker ${label##*-w-}" ;; esac
    [ -f "$record/log.txt" ] || fail "nothing has been launched here."
    if [ "$follow" = true ] && [ "$(state)" = running ]; then
        tail -n "$lines" -F --pid="$(cat "$record/pid")" "$record/log.txt"
    else
        tail -n "$lines" "$record/log.txt"
    fi | sed -u "s|^|[$label] |"
}

status() {
    local key digest
    key=$(cat "$stamp" 2>/dev/null) || key=none
    digest=$(cat "$record/digest" 2>/dev/null) || digest=-
    echo "mmrl_host $(hostname) $key $(state) $digest"
}

case ${1:-} in
    setup | launch | status | stop | logs | foreground | detached) "$@" ;;
    *) fail "'${1:-}' is not a command of worker.sh" ;;
esac
