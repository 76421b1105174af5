"""Tests that every sample counts once for any chunk size and number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax import problems
from mmrl_jax.evaluation.chunks import chunk_size, in_chunks
from tests import tiny


@pytest.mark.parametrize(
    ("count", "max_size", "devices", "size"),
    [
        (10, 4, 1, 4),  # 4, 4 and 2 that are filled up.
        (9, 8, 1, 5),  # Not 8 and 1.
        (8, 8, 8, 8),
        (3, 8, 1, 3),
        (3, 8, 8, 8),
        (17, 8, 8, 8),
        (9, 8, 2, 6),
    ],
)
def test_chunks_are_even_and_the_devices_divide_them(count, max_size, devices, size):
    assert chunk_size(count, max_size, devices=devices) == size


def test_every_sample_is_worked_on_once_and_in_order():
    for count in range(1, 10):
        for max_size, devices in ((1, 1), (4, 1), (4, 4), (8, 2)):
            seen = []

            def double(chunk, seen=seen):
                seen.append(len(chunk["x"]))
                return {"y": 2 * jnp.asarray(chunk["x"])}

            batch = {"x": np.arange(2 * count).reshape(count, 2)}
            found = in_chunks(double, batch, max_size=max_size, devices=devices)
            np.testing.assert_array_equal(found["y"], 2 * batch["x"])
            assert set(seen) == {chunk_size(count, max_size, devices=devices)}


def test_questions_are_answered_in_chunks_and_shared_by_the_devices(monkeypatch):
    found, work = [], []
    for devices, together in ((1, 16), (8, 8)):
        config = tiny.token_config(
            mesh__data=devices, last__prompts_per_update=together, last__num_minibatches=1
        )
        problem = problems.make(config)
        evaluator = problem.evaluator(jax.random.key(0), prompts=13)
        variables = problem.initial_variables()
        calls, generate = [], evaluator._generate

        def counted(variables, chunk, rng, generate=generate, calls=calls):
            calls.append((variables, chunk, rng))
            return generate(variables, chunk, rng)

        monkeypatch.setattr(evaluator, "_generate", counted)
        found.append(evaluator(variables, "train", shuffle_images=True))
        # 13 at once; then twice one question a device, 3 of them to fill up.
        assert [len(chunk.images) for _, chunk, _ in calls] == ([13] if devices == 1 else [8, 8])
        assert len(calls[0][1].images.sharding.device_set) == devices
        work.append(generate.lower(*calls[0]).compile().cost_analysis()["flops"])
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert len(np.unique(found[0].prompts.images.reshape(13, -1), axis=0)) > 1
    assert work[1] < work[0] * 2 / 13
