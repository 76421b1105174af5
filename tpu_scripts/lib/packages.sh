# shellcheck shell=bash
# The packages that a host needs in addition to requirements.lock.

# install_accelerator_packages PYTHON PLATFORM. PLATFORM is tpu or gpu. Runs in the checkout. With the
# lock in the same command its versions hold: JAX's own, and libtpu or CUDA in the versions that
# this JAX asks for. gcsfs and google-cloud-storage open a workdir on gs://.
install_accelerator_packages() {
    local python=$1 extra jax
    case $2 in
        tpu) extra=tpu ;;
        gpu) extra=cuda13 ;;
    esac
    jax=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
    uv pip install --python "$python" -r requirements.lock "jax[$extra]==$jax" gcsfs google-cloud-storage
}
