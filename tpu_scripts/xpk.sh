#!/usr/bin/env bash
# Trains on TPUs of Google Kubernetes Engine through xpk: the way to Ironwood (tpu7x), which the Cloud TPU
# API does not offer. Needs xpk, docker and kubectl: https://github.com/AI-Hypercomputer/xpk
#
#   xpk.sh image                  builds an image of the last commit with the locked packages, and pushes it
#   xpk.sh create                 creates the cluster with one slice
#   xpk.sh launch -- COMMAND...   submits a command as a workload; Kubernetes starts it again after
#                                 a preemption, from the checkpoint in its --workdir=gs://...
#   xpk.sh logs                   follows the log of worker 0, or of --worker=all
#   xpk.sh status                 lists the workloads of the cluster
#   xpk.sh stop                   deletes the workload; it saves a checkpoint first
#   xpk.sh delete                 deletes the cluster
#
# A cluster costs money until it is deleted: nothing deletes it by itself. --dry_run prints what would be
# executed.
#

# shellcheck disable=SC2034  # options are also read by their names
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

opt_project=""  # Google Cloud project.
opt_zone=""  # Zone, for example us-central1-c.
opt_cluster=""  # Name of the cluster.
opt_name=""  # Name of the workload.
opt_tpu_type=""  # Type with size, for example tpu7x-16.
opt_provisioning=spot  # One of spot, on-demand, reserved, flex-start.
opt_reservation=""  # Name of the reservation, with reserved.
opt_image=""  # Image without its tag, for example us-docker.pkg.dev/PROJECT/REPOSITORY/mmrl_jax.
opt_worker=0  # Worker whose log is shown: 0 or all.
opt_lines=100  # Lines of the log that are shown first.
opt_max_restarts=10  # Times that Kubernetes starts the workload again.
opt_grace_seconds=120  # Time that a worker has after SIGTERM.
opt_env_file=$here/xpk.env  # File with options, one NAME=VALUE a line.
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

xpk_cluster() {
    run xpk "$@" "--cluster=$opt_cluster" "--project=$opt_project" "--zone=$opt_zone"
}

# The tag is the commit, so that a workload runs what it was launched with.
read_image() {
    require image
    read_commit
    image=$opt_image:${commit:0:12}
}

image() {
    read_image
    make_archive
    if is_true "$opt_dry_run"; then
        printf '%s < %s\n' "$(quote docker build --file=tpu_scripts/Dockerfile "--tag=$image" -)" "$(quote "$archive")"
    else
        docker build --file=tpu_scripts/Dockerfile "--tag=$image" - <"$archive"
    fi
    run docker push "$image"
    say "Pushed $image."
}

# xpk itself leaves a cluster as it is that has these slices already.
create() {
    local capacity
    require tpu_type
    read_accelerator tpu_type "$opt_tpu_type"
    case $opt_provisioning in
        spot | on-demand) capacity=--$opt_provisioning ;;
        flex-start) capacity=--flex ;;
        reserved)
            require reservation
            capacity=--reservation=$opt_reservation
            ;;
        *) die "--provisioning is '$opt_provisioning', and must be spot, on-demand, reserved or flex-start." ;;
    esac
    if is_true "$opt_dry_run"; then printf '# '; fi
    printf '%s\n' "$opt_tpu_type ($opt_provisioning): $(cost_per_hour), without the nodes that have no TPU."
    confirm "Create the cluster '$opt_cluster' in $opt_zone?"
    xpk_cluster cluster create "--tpu-type=$opt_tpu_type" --num-slices=1 "$capacity"
}

launch() {
    local flex=""
    require name tpu_type
    require_run_command launch
    check_workdir "the container"
    read_image
    if ! is_true "$opt_dry_run" && xpk_cluster workload list "--filter-by-job=^$opt_name\$" |
        grep -q "^${opt_name}[[:space:]]"; then
        say "The workload $opt_name is there already; 'xpk.sh logs' follows it, 'xpk.sh stop' deletes it."
        return
    fi
    if [ "$opt_provisioning" = flex-start ]; then flex=--flex; fi
    add_distributed_flags auto
    # shellcheck disable=SC2086  # an empty $flex must vanish
    xpk_cluster workload create "--workload=$opt_name" "--tpu-type=$opt_tpu_type" --num-slices=1 $flex \
        "--docker-image=$image" "--max-restarts=$opt_max_restarts" \
        "--termination-grace-period-seconds=$opt_grace_seconds" \
        "--command=exec bash /mmrl_jax/tpu_scripts/worker.sh foreground $(quote "${full_command[@]}")"
}

logs() {
    local selector=jobset.sigs.k8s.io/jobset-name=$opt_name
    require name
    case $opt_worker in
        all) ;;
        0) selector=$selector,batch.kubernetes.io/job-completion-index=0 ;;
        *) die "--worker is '$opt_worker', and must be 0 or all." ;;
    esac
    run gcloud container clusters get-credentials "$opt_cluster" "--project=$opt_project" "--location=${opt_zone%-*}"
    run kubectl logs --follow "--selector=$selector" --all-containers --prefix --max-log-requests=512 "--tail=$opt_lines"
}

status() {
    xpk_cluster workload list
}

stop() {
    require name
    xpk_cluster workload delete "--workload=$opt_name" --force
}

delete() {
    xpk_cluster cluster delete
}

case ${1:-} in
    image | create | launch | logs | status | stop | delete) verb=$1 && shift ;;
    help | --help | -h) usage && exit ;;
    *) die "'${1:-}' is not one of image, create, launch, logs, status, stop, delete; see '${0##*/} --help'." ;;
esac
parse_options "$@"
[ "$verb" = image ] || require project zone cluster
"$verb"
