"""Measures the arrays that a run holds in addition to its carry and its constants."""

from collections.abc import Iterable, Iterator
import contextlib
import gc
from typing import Any

import jax
import pytest

from mmrl_jax.training import loop
from mmrl_jax.training.checkpoint import Checkpointer


def array_bytes(arrays: Iterable[jax.Array]) -> int:
    """Returns the bytes of arrays on all devices, counting shared buffers once."""
    shards = (shard.data for x in arrays if x.size for shard in x.addressable_shards)
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


@contextlib.contextmanager
def shares_of_runs() -> Iterator[list[tuple[str, float]]]:
    """A list that gets (stage, share) whenever a run within could save its carry.

    The share is of the bytes of all arrays that live then, but for those from before, over those of
    the carry and of the data of the stage that runs.
    """
    gc.collect()
    before = jax.live_arrays()  # They cannot make room for others meanwhile.
    others = {id(x) for x in before}
    shares: list[tuple[str, float]] = []
    stages: list[loop.Stage] = []
    run, save = loop.run, Checkpointer.save

    def noted_run(stage: loop.Stage, **kwargs: Any) -> loop.Result:
        stages.append(stage)
        try:
            return run(stage, **kwargs)
        finally:
            stages.pop()

    def noted_save(self: Checkpointer, step: int, carry: Any, **kwargs: Any) -> bool:
        gc.collect()
        live = [x for x in jax.live_arrays() if id(x) not in others]
        owned = jax.tree.leaves((carry, stages[-1].constants))
        shares.append((stages[-1].name, array_bytes(live) / array_bytes(owned)))
        saved = save(self, step, carry, **kwargs)
        self.wait()  # On CPU the files are written from a copy of the carry.
        return saved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", noted_run)
        patch.setattr(Checkpointer, "save", noted_save)
        yield shares
