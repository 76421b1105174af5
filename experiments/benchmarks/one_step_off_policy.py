"""Updates whose reward functions score while the next completions are sampled, and ones that wait.

The model is a random Llama of 6.8M parameters in float32, beside a small vision encoder. The reward
function sleeps, so that the rewards of an update take as long as sampling its completions.
"""

from collections.abc import Iterator
import json
import pathlib
import tempfile
import time
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from experiments.benchmarks import grpo
from experiments.benchmarks.harness import Row, compare, seconds
from mmrl_jax import problems
from mmrl_jax.configs import folder_grpo
from mmrl_jax.training import loop
from mmrl_jax.training.stage import Carry

LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PROMPTS, COMPLETIONS, TOKENS, WORKERS, RECORDS = 4, 4, 64, 4, 16


def asleep(*, completion: str, seconds: float, **_: Any) -> float:
    """Returns the length of a completion, after some time in seconds."""
    time.sleep(seconds)
    return float(len(completion))


def rows(runs: int) -> Iterator[Row]:
    """Measures the time of an update with and without `one_step_off_policy`."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        model = grpo.random_llama(path / "model", **LLAMA)
        fast = Updates(config(model, folder(path / "fast", 0.0), one_step=False))
        fast.collect()
        sampling_s = float(np.median([seconds(fast.collect) for _ in range(3)]))
        call_s = sampling_s * WORKERS / (PROMPTS * COMPLETIONS)
        images = folder(path / "slow", call_s)
        ours, peer = (Updates(config(model, images, one_step=one)) for one in (True, False))
        yield compare(
            f"rewards and sampling of {sampling_s:.2f} s each: meanwhile / one after the other",
            lambda: seconds(ours.update),
            lambda: seconds(peer.update),
            unit="s",
            runs=runs,
        )


class Updates:
    """Updates of a run, one call each."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._stage = problems.make(config).stage("grpo")
        self._carry, _ = loop.start(self._stage)
        assert self._stage.on_host is not None
        self._host = self._stage.on_host(self._carry, self._stage.constants)

    def collect(self) -> Any:
        """Samples and scores the completions of an update, and returns them."""
        return self._host.collect(self._carry, self._stage.constants)

    def update(self) -> Carry:
        """Makes an update and returns its carry."""
        collected = self.collect()
        self._carry, _ = self._host.step(self._carry, self._stage.constants, collected)
        return self._carry


def config(
    model: pathlib.Path, images: pathlib.Path, *, one_step: bool
) -> ml_collections.ConfigDict:
    """Returns the config of a run.

    Args:
      model: Directory of a decoder.
      images: Directory of the records.
      one_step: Whether rewards are computed while the next completions are sampled.
    """
    changes = {
        "mesh": {"data": 1},
        "dataset": {
            "directory": str(images),
            "height": 16,
            "width": 16,
            "prompt_tokens": 64,
            "completion_tokens": TOKENS,
            "validation_size": 2,
            "test_size": 2,
        },
        "rewards": {"functions": (f"{__name__}:asleep",), "workers": WORKERS, "timeout_s": 600.0},
        "model": {
            "checkpoint": str(model),
            "width": 16,
            "heads": 2,
            "patch_hidden": 16,
            "vision_layers": 0,
            "dtype": "float32",
            "remat": False,
        },
        "grpo": {
            "prompts_per_update": PROMPTS,
            "num_completions": COMPLETIONS,
            "num_minibatches": 1,
            "grad_accum_steps": 1,
            "importance_weight_cap": 2.0,
            "one_step_off_policy": one_step,
        },
    }
    return problems.complete(folder_grpo.CONFIG, changes)


def folder(directory: pathlib.Path, seconds: float) -> pathlib.Path:
    """Writes records with images of noise, and returns their directory.

    Args:
      directory: Directory to create.
      seconds: Time that the reward function sleeps.
    """
    directory.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (RECORDS, 16, 16, 3), np.uint8)
    lines = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(directory / f"{i}.png")
        record = {"file_name": f"{i}.png", "prompt": "What is it?", "answer": "noise"}
        lines.append(json.dumps(record | {"seconds": seconds}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return directory
