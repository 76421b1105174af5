# shellcheck shell=bash
# The queued resource of Cloud TPU: a request that waits for a TPU, and then is the TPU.

# Runs or prints a command on the queued resource. queued_resource VERB ARGUMENT...
queued_resource() {
    local verb=$1
    shift
    run gcloud compute tpus queued-resources "$verb" "$opt_name" \
        "--project=$opt_project" "--zone=$opt_zone" "$@"
}

# Sets queued_state to the state that Google gives, or to ABSENT. Any other answer (no network, no
# permission) is a failure: taken for absence, it would create a second TPU.
read_queued_state() {
    local output
    if is_true "$opt_dry_run"; then
        queued_resource describe '--format=value(state.state)'
        queued_state=UNKNOWN
    elif output=$(queued_resource describe '--format=value(state.state)' --verbosity=error 2>&1) &&
        queued_state=$(grep -E '^[A-Z_]+$' <<<"$output"); then
        queued_state=${queued_state##*$'\n'}
    elif grep -q NOT_FOUND <<<"$output"; then
        queued_state=ABSENT
    else
        printf 'The state of %s could not be read: %s\n' "$opt_name" "$output" >&2
        return 1
    fi
}

failure_reason() {
    queued_resource describe '--format=value(state.failedData.error.message)' 2>/dev/null || true
}

# Requests a TPU. What deletes it after --max_run_duration: the service itself for flex-start, the one
# kind for which it takes --max-run-duration; else a timer on worker 0, see deadline.sh.
request_queued_resource() {
    local seconds wait_seconds track="" arguments
    seconds=$(seconds_of max_run_duration)
    wait_seconds=$(seconds_of valid_until_duration)
    arguments=(
        "--accelerator-type=$opt_accelerator_type"
        "--runtime-version=${opt_runtime_version:-$default_runtime}"
        "--node-id=$opt_name"
        "--valid-until-duration=${wait_seconds}s"
    )
    case $opt_provisioning in
        spot) arguments+=(--spot) ;;
        reserved) arguments+=(--reserved) ;;
        flex-start)
            track=alpha
            arguments+=(--provisioning-model=flex-start "--max-run-duration=${seconds}s")
            ;;
    esac
    if [ "$opt_provisioning" != flex-start ]; then
        arguments+=(
            "--metadata=mmrl-name=$opt_name,mmrl-zone=$opt_zone,mmrl-project=$opt_project,mmrl-max-run-seconds=$seconds"
            "--metadata-from-file=startup-script=$here/deadline.sh"
        )
    fi
    if [ -n "$opt_service_account" ]; then arguments+=("--service-account=$opt_service_account"); fi
    if [ -n "$opt_network" ]; then arguments+=("--network=$opt_network"); fi
    if [ -n "$opt_subnetwork" ]; then arguments+=("--subnetwork=$opt_subnetwork"); fi
    if is_true "$opt_internal_ips"; then arguments+=(--internal-ips); fi
    # shellcheck disable=SC2086  # an empty $track must vanish
    run gcloud $track compute tpus queued-resources create "$opt_name" \
        "--project=$opt_project" "--zone=$opt_zone" "${arguments[@]}"
}

# Waits until the request is filled. Returns 1, with queued_state set, if it will not be.
wait_until_active() {
    local last=""
    while :; do
        read_queued_state || die "giving up; the request for $opt_name stays as it is."
        if [ "$queued_state" != "$last" ]; then say "$opt_name: $queued_state"; fi
        last=$queued_state
        case $queued_state in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) return 1 ;;
        esac
        if is_true "$opt_dry_run"; then return 0; fi
        sleep "$opt_poll_seconds"
    done
}

# Deletes the queued resource with its TPU, and waits until it is gone.
delete_queued_resource() {
    queued_resource delete --force --quiet || return
    if is_true "$opt_dry_run"; then return; fi
    until read_queued_state && [ "$queued_state" = ABSENT ]; do
        sleep "$opt_poll_seconds"
    done
}

# Says what the TPU costs, and asks. confirm_cost TIMES, the number of TPUs that may follow each other.
confirm_cost() {
    local hours text
    hours=$(awk "BEGIN { print $(seconds_of max_run_duration) / 3600 }")
    text="$opt_accelerator_type ($opt_provisioning): $(cost_per_hour); at most $opt_max_run_duration"
    if [ "$1" -gt 1 ]; then text="$text, $1 times over"; fi
    text="$text: \$$(dollars "$chips" "$chip_price" "$hours" "$1")."
    if is_true "$opt_dry_run"; then printf '# '; fi
    printf '%s\n' "$text"
    confirm "Create '$opt_name' in $opt_zone?"
}
