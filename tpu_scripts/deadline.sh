#!/usr/bin/env bash
# Startup script of the workers of a TPU: worker 0 deletes the TPU at its deadline.
#
# tpu.sh passes it as metadata, with the values that it reads. It runs as root at each start of a VM.
# The service account of the VM needs the permission to delete the queued resource (roles/tpu.admin).
set -euo pipefail

attribute() {
    curl -fsS --retry 5 -H "Metadata-Flavor: Google" \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

if [ "$(attribute agent-worker-number)" != 0 ]; then exit; fi

# A restart does not move the deadline.
file=${MMRL_DEADLINE_FILE:-/var/lib/mmrl_deadline}
now=$(date +%s)
[ -f "$file" ] || echo $((now + $(attribute mmrl-max-run-seconds))) >"$file"
remaining=$(($(cat "$file") - now))
if [ "$remaining" -lt 1 ]; then remaining=1; fi

# Every ten minutes again while the TPU is still there.
systemd-run --unit=mmrl-deadline --on-active="${remaining}s" --on-unit-inactive=600s \
    "$(command -v gcloud)" compute tpus queued-resources delete "$(attribute mmrl-name)" \
    --project="$(attribute mmrl-project)" --zone="$(attribute mmrl-zone)" --force --quiet --async
