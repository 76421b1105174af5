"""Settings of all tests: eight simulated CPU devices, and a cache of compiled programs."""

from collections.abc import Iterator
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 8
SLOW_TIMEOUT_S = 3600

# JAX reads these when it is first imported, and a test process has only one such moment. Eight
# simulated devices cost the other tests about a tenth of their time.
if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its devices")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES} "
    # Tests compile much and compute little: half the time of a cold run.
    "--xla_backend_optimization_level=0".strip()
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the cache of data sets out of the user's home directory."""
    from mmrl_jax.data import files

    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setattr(files, "cache_directory", lambda: directory)
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers."""
    config.addinivalue_line("markers", "slow: takes minutes; run by `make test-slow`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives slow tests without a timeout a longer one than that of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
