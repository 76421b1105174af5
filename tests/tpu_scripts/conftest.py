"""The cloud that each of these tests has for itself."""

from collections.abc import Iterator
import os
import pathlib
import signal

import pytest

from tests.tpu_scripts.cloud import Cloud


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Iterator[Cloud]:
    """A cloud without a TPU; what was launched in it is killed at the end."""
    cloud = Cloud(tmp_path)
    yield cloud
    for pid in cloud.hosts.glob("*/mmrl_run/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
