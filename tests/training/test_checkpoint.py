"""Tests of mmrl_jax.training.checkpoint."""

import json
import logging
import random
import resource
import subprocess
import sys
import time

import flax
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import ml_collections
import numpy as np
import optax
import pytest

from mmrl_jax.training import checkpoint


def _config(**changes):
    config = {"seed": 0, "updates": 10, "ppo": {"clip": 0.2, "sizes": (8, 8)}}
    return ml_collections.ConfigDict(config | changes)


def _open(workdir, **changes):
    arguments = {
        "config": _config(),
        "keep": 2,
        "best_metric": None,
        "save_interval": 1,
    }
    return checkpoint.Checkpointer(workdir, **(arguments | changes))


@flax.struct.dataclass
class _Carry:
    params: dict
    optimizer: optax.OptState
    raw_key: jax.Array
    typed_keys: jax.Array
    environment: dict
    step: jax.Array


def _carry(seed=0):
    """A carry with every kind of leaf: bfloat16, bool, int, NaN, empty, raw and typed keys."""
    key = jax.random.PRNGKey(seed)
    params = {"dense": {"kernel": jax.random.normal(key, (7, 5)), "bias": jnp.zeros(5)}}
    return _Carry(
        params=params,
        optimizer=optax.adam(1e-3).init(params),
        raw_key=key,
        typed_keys=jax.random.split(jax.random.key(seed + 1), 3),
        environment={
            "image": jax.random.bits(key, (2, 32, 32, 3), jnp.uint8),
            "done": jnp.array([True, False]),
            "half": jax.random.normal(key, (3,), jnp.bfloat16),
            "odd": jnp.array([jnp.nan, -0.0, jnp.inf]),
            "nothing": jnp.zeros((0, 3), jnp.int32),
        },
        step=jnp.int32(seed),
    )


def _bits(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes())
    return (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())


def _assert_same_bits(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert _bits(one) == _bits(two)


def _save(workdir, steps, **changes):
    with _open(workdir, **changes) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, _carry(step), extra={"position": step}, metrics={})


def _largest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("kind", ["arrays", "structs"])
def test_round_trip_is_bitwise(tmp_path, kind):
    carry = _carry(3)
    with _open(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(carry) is None
        checkpointer.save(3, carry, extra={"epoch": 1, "files": ["a"]}, metrics={})
    target = _carry(4) if kind == "arrays" else jax.eval_shape(_carry, 4)
    with _open(tmp_path) as checkpointer:
        restored, extra, step = checkpointer.restore_latest(target)
    assert (extra, step) == ({"epoch": 1, "files": ["a"]}, 3)
    _assert_same_bits(restored, carry)
    # The stream of random numbers goes on where it was.
    assert jax.random.bits(restored.typed_keys[1]) == jax.random.bits(carry.typed_keys[1])
    # Uncommitted as freshly made arrays are, so that no jit compiles again.
    assert not restored.params["dense"]["kernel"].committed


def test_numpy_leaves_come_back_as_numpy(tmp_path):
    tree = {"position": np.ones(1_000_000, np.int64), "scale": jnp.float32(3)}
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, tree, extra={}, metrics={})
        tree["position"][:] = 9  # After the save returned: must not reach the file.
        checkpointer.wait()
        restored, _, _ = checkpointer.restore_latest(tree)
    assert isinstance(restored["position"], np.ndarray)
    assert restored["position"].dtype == np.int64  # jax would have made it int32
    assert (restored["position"] == 1).all()


def test_save_then_donate_writes_what_was_saved(tmp_path):
    """The carry is donated and overwritten while the background write runs."""
    make = jax.jit(lambda key: {"w": jax.random.normal(key, (512, 1024)), "n": jnp.zeros(4)})
    carry = make(jax.random.PRNGKey(0))
    expected = jax.tree.map(lambda x: np.array(x, copy=True), make(jax.random.PRNGKey(0)))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, carry, extra={}, metrics={})
        later = advance(carry)
        # A view of the carry held by the writer would have kept JAX from donating it.
        assert carry["w"].is_deleted()
        for _ in range(10):
            later = advance(later)
        checkpointer.wait()
        restored, _, _ = checkpointer.restore_latest(later)
        committed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), later
        )
        again, _, _ = checkpointer.restore_latest(committed)
    _assert_same_bits(restored, expected)
    # The restored carry can be donated as well, at once, and the values are right.
    for carry in (restored, again):
        after = advance(carry)
        assert carry["w"].is_deleted()
        np.testing.assert_array_equal(after["w"], expected["w"] + np.float32(1))


def test_restore_compiles_nothing_again(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    carry = step({"w": jnp.zeros(3), "n": jnp.int32(0)})
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, carry, extra={}, metrics={})
        restored, _, _ = checkpointer.restore_latest(carry)
    step(carry)
    compiled = step._cache_size()
    step(restored)
    assert step._cache_size() == compiled


def test_keeps_the_newest_and_the_best(tmp_path):
    # Scores NaN, 0.9, 0.1, none, 0.3: best is step 2; the newest two are 4 and 5.
    scores = {1: float("nan"), 2: 0.9, 3: 0.1, 4: None, 5: 0.3}
    with _open(tmp_path, best_metric="eval/train/success") as checkpointer:
        for step, score in scores.items():
            metrics = {} if score is None else {"eval/train/success": score}
            checkpointer.save(step, _carry(step), extra={}, metrics=metrics)
    assert checkpoint.saved_steps(tmp_path) == [2, 4, 5]
    # The scores survive a restart: 0.8 does not replace 0.9.
    with _open(tmp_path, best_metric="eval/train/success") as checkpointer:
        checkpointer.restore_latest(_carry())
        checkpointer.save(6, _carry(6), extra={}, metrics={"eval/train/success": 0.8})
    assert checkpoint.saved_steps(tmp_path) == [2, 5, 6]
    parts, step = checkpoint.restore_parts(tmp_path, {"params": _carry().params}, which="best")
    assert step == 2
    _assert_same_bits(parts["params"], _carry(2).params)


def test_save_interval_and_force(tmp_path):
    """Dispatches of 4 updates and an interval of 6: saves at 8 and 12, and 13 by force."""
    with _open(tmp_path, save_interval=6, keep=9) as checkpointer:
        saved = [
            step
            for step in (4, 8, 8, 12, 16)
            if checkpointer.save(step, _carry(), extra={}, metrics={})
        ]
        assert saved == [8, 12]
        assert checkpointer.save(16, _carry(), extra={}, metrics={}, force=True)
        # A last forced save of the step just written is nothing to do.
        assert not checkpointer.save(16, _carry(), extra={}, metrics={}, force=True)
    assert checkpoint.saved_steps(tmp_path) == [8, 12, 16]


def test_a_rollback_restores_the_last_good_checkpoint_that_was_due(tmp_path):
    """Saves of an interval of 4; those of other steps are of a run that was stopped there."""

    def save(checkpointer, step, **changes):
        return checkpointer.save(step, _carry(step), extra={}, metrics={}, **changes)

    with _open(tmp_path, save_interval=4) as checkpointer:
        assert save(checkpointer, 0, force=True)
        assert save(checkpointer, 4)
        for step in (5, 6, 7):
            assert save(checkpointer, step, force=True)
    # The one to go back to is kept in addition to the newest two.
    assert checkpoint.saved_steps(tmp_path) == [4, 6, 7]
    with _open(tmp_path, save_interval=4) as checkpointer:
        assert checkpointer.restore_latest(_carry())[2] == 7
        # The save of 9 is due, although 8 was saved in between, because 8 was not good.
        assert save(checkpointer, 8, is_good=False) and save(checkpointer, 9, is_good=False)
        restored, _, step = checkpointer.restore_latest(_carry(), rollback=True)
        assert step == 4 and checkpoint.saved_steps(tmp_path) == [4]
        _assert_same_bits(restored, _carry(4))
        # The deleted steps can be saved again.
        assert not save(checkpointer, 6) and save(checkpointer, 8) and save(checkpointer, 12)
    assert checkpoint.saved_steps(tmp_path) == [8, 12]


def test_saving_over_an_old_run_is_refused(tmp_path):
    _save(tmp_path, [1, 2])
    with _open(tmp_path) as checkpointer, pytest.raises(ValueError, match="restore_latest"):
        checkpointer.save(2, _carry(), extra={}, metrics={})


def test_another_model_is_refused_with_its_paths(tmp_path):
    _save(tmp_path, [1])
    other = _carry()
    dense = {"kernel": jnp.zeros((7, 6)), "bias": jnp.zeros(5, jnp.bfloat16), "scale": jnp.ones(1)}
    other = other.replace(params={"dense": dense}, typed_keys=jax.random.key(0, impl="rbg"))
    with _open(tmp_path) as checkpointer:
        with pytest.raises(ValueError) as caught:
            checkpointer.restore_latest(other)
    message = str(caught.value)
    assert isinstance(caught.value, checkpoint.CheckpointMismatch)
    assert "4 paths differ" in message
    assert "params/dense/kernel: float32[7, 5] in the checkpoint, float32[7, 6]" in message
    assert "params/dense/bias: float32[5] in the checkpoint, bfloat16[5]" in message
    assert "params/dense/scale: absent in the checkpoint, float32[1]" in message
    assert "uint32[3, 2] (threefry2x32 key) in the checkpoint, uint32[4] (rbg key)" in message
    # A mismatch is no damage: the checkpoint stays where it is.
    assert checkpoint.saved_steps(tmp_path) == [1]


def test_workdir_of_another_config_is_refused(tmp_path):
    _save(tmp_path, [1])
    other = _config(updates=20, ppo={"clip": 0.1, "sizes": (8, 8)})
    with pytest.raises(ValueError) as caught:
        _open(tmp_path, config=other, may_change=("updates",))
    assert "ppo.clip: 0.2 there, 0.1 now" in str(caught.value)
    assert "updates" not in str(caught.value) and "sizes" not in str(caught.value)
    # Allowed: a longer run; the file then has the new value.
    _open(tmp_path, config=_config(updates=20), may_change=("updates",)).close()
    assert json.loads((tmp_path / "config.json").read_text())["updates"] == 20
    # A group allows its fields.
    _open(tmp_path, config=other, may_change=("ppo",)).close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "record", "no_carry", "no_record"])
def test_damaged_newest_falls_back_and_says_so(tmp_path, caplog, damage):
    _save(tmp_path, [1, 2])
    newest = tmp_path / "checkpoints" / "2"
    if damage in ("flip", "truncate"):
        path = _largest_file(newest / "carry")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    elif damage == "record":
        path = _largest_file(newest / "record")
        path.write_text(path.read_text().replace('"position": 2', '"position": 3'))
    else:
        for path in (newest / damage.removeprefix("no_")).rglob("*"):
            if path.is_file():
                path.unlink()
    with _open(tmp_path) as checkpointer:
        with caplog.at_level(logging.WARNING):
            restored, extra, step = checkpointer.restore_latest(_carry())
        assert (step, extra) == (1, {"position": 1})
        _assert_same_bits(restored, _carry(1))
        assert "Checkpoint 2 is damaged" in caplog.text
        assert "falling back to checkpoint 1" in caplog.text
        # The run reaches step 2 again and must be able to save it.
        assert checkpointer.save(2, _carry(2), extra={"position": 2}, metrics={})
    assert checkpoint.saved_steps(tmp_path) == [1, 2]
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    with _open(tmp_path) as checkpointer:
        _assert_same_bits(checkpointer.restore_latest(_carry())[0], _carry(2))


def test_every_byte_of_the_arrays_is_covered(tmp_path):
    """A changed byte anywhere in the file of array data is noticed, never restored as wrong."""
    _save(tmp_path, [1])
    path = _largest_file(tmp_path / "checkpoints" / "1" / "carry")
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 15)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        path.write_bytes(damaged)
        try:
            restored, _ = checkpoint.restore_parts(tmp_path, {"": _carry()}, which="latest")
        except checkpoint.CheckpointDamaged:
            continue
        _assert_same_bits(restored[""], _carry(1))  # A byte that nothing reads.


def test_half_written_checkpoint_is_ignored(tmp_path):
    _save(tmp_path, [1])
    directory = tmp_path / "checkpoints"
    half = directory / "2.orbax-checkpoint-tmp"
    (half / "carry").mkdir(parents=True)
    with _open(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(_carry())[2] == 1
    assert not half.exists()


def test_only_damaged_checkpoints_is_an_error(tmp_path):
    _save(tmp_path, [1])
    _largest_file(tmp_path / "checkpoints" / "1" / "carry").write_bytes(b"")
    with _open(tmp_path) as checkpointer:
        with pytest.raises(checkpoint.CheckpointDamaged, match="delete that directory"):
            checkpointer.restore_latest(_carry())
    assert checkpoint.saved_steps(tmp_path) == [1]


def test_restores_onto_another_sharding_and_back(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    carry = {"x": jnp.arange(8.0), "keys": jax.random.split(jax.random.key(1), 4)}
    target = {
        "x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharded),
        "keys": jax.ShapeDtypeStruct((4,), carry["keys"].dtype, sharding=sharded),
    }
    with _open(tmp_path) as checkpointer:
        checkpointer.save(1, carry, extra={}, metrics={})
        restored, _, _ = checkpointer.restore_latest(target)
        _assert_same_bits(restored, carry)
        assert restored["x"].sharding == sharded
        assert restored["keys"].sharding.is_equivalent_to(sharded, 1)
        checkpointer.save(2, restored, extra={}, metrics={})
        back, _, _ = checkpointer.restore_latest(carry)
    _assert_same_bits(back, carry)
    assert len(back["x"].devices()) == 1


_KILLED = """
import itertools, sys
import jax.numpy as jnp
from mmrl_jax.training import checkpoint

like = {"w": jnp.zeros(300_000), "n": jnp.int32(0)}
with checkpoint.Checkpointer(
    sys.argv[1], config={"seed": 0}, keep=2, best_metric=None, save_interval=1
) as checkpointer:
    restored = checkpointer.restore_latest(like)
    first = 1 if restored is None else restored[2] + 1
    for step in itertools.count(first):
        carry = {"w": jnp.full(300_000, step, jnp.float32), "n": jnp.int32(step)}
        checkpointer.save(step, carry, extra={"step": step}, metrics={})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_whole_checkpoint(tmp_path):
    rng = random.Random(0)
    like = {"w": jnp.zeros(300_000), "n": jnp.int32(0)}
    reached = 0
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(rng.randrange(2, 6)):
            begun = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.wait()
        parts, step = checkpoint.restore_parts(tmp_path, {"": like}, which="latest")
        carry = parts[""]
        # The save before the last begun one was waited for, so it is whole.
        assert step >= begun - 1 > reached
        assert int(carry["n"]) == step and (np.asarray(carry["w"]) == step).all()
        reached = begun - 1
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_restore_parts_takes_some_and_leaves_the_rest(tmp_path):
    _save(tmp_path, [1, 2])
    like = jax.eval_shape(_carry)
    wanted = {"params/dense": like.params["dense"], "environment": like.environment}
    parts, step = checkpoint.restore_parts(tmp_path, wanted, which=1)
    assert step == 1 and list(parts) == list(wanted)
    _assert_same_bits(parts["params/dense"], _carry(1).params["dense"])
    _assert_same_bits(parts["environment"], _carry(1).environment)
    with pytest.raises(ValueError, match=r"steps are \[1, 2\]"):
        checkpoint.restore_parts(tmp_path, wanted, which=7)
    with pytest.raises(ValueError, match="has a score"):
        checkpoint.restore_parts(tmp_path, wanted, which="best")
    with pytest.raises(ValueError, match="latest"):
        checkpoint.restore_parts(tmp_path, wanted, which="newest")
    misplaced = {"params": like.params["dense"]}
    with pytest.raises(checkpoint.CheckpointMismatch, match="params/kernel: absent in the ch"):
        checkpoint.restore_parts(tmp_path, misplaced, which="latest")
    # A part that lacks a leaf of the checkpoint is another model's too.
    lacking = {"environment": like.environment, "params/dense": {"bias": jnp.zeros(5)}}
    with pytest.raises(checkpoint.CheckpointMismatch, match=r"dense/kernel: .* absent in the mo"):
        checkpoint.restore_parts(tmp_path, lacking, which="latest")
    with pytest.raises(ValueError, match="No checkpoint in"):
        checkpoint.restore_parts(tmp_path / "empty", wanted, which="latest")


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        _open(tmp_path / "file" / "run")


def test_no_space_is_a_clear_error_and_spares_the_last_good(tmp_path):
    """A limit on file size stands in for a full disk: both fail in the background write."""
    big = {"w": jax.random.normal(jax.random.PRNGKey(0), (300, 1000))}  # 1.2 MB
    checkpointer = _open(tmp_path, keep=1)
    checkpointer.save(1, big, extra={}, metrics={})
    checkpointer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        with pytest.raises(checkpoint.CheckpointWriteError) as caught:
            checkpointer.save(2, big, extra={}, metrics={})
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpointer.close()
    assert "Checkpoint 2 could not be written" in str(caught.value)
    assert "Checkpoint 1 is intact" in str(caught.value)
    with _open(tmp_path, keep=1) as again:
        restored, _, step = again.restore_latest(big)
        assert step == 1
        _assert_same_bits(restored, big)
        assert again.save(2, big, extra={}, metrics={})
    assert checkpoint.saved_steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("leaf", "words"),
    [(3, "'n' is 3"), (jnp.asarray(1.0), "weakly typed")],
)
def test_leaves_that_no_file_keeps_are_refused(tmp_path, leaf, words):
    with _open(tmp_path) as checkpointer, pytest.raises(ValueError, match=words):
        checkpointer.save(1, {"n": leaf}, extra={}, metrics={})


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        _open(tmp_path, keep=0)
    with pytest.raises(ValueError, match="save_interval is 0"):
        _open(tmp_path, save_interval=0)
    with _open(tmp_path) as checkpointer, pytest.raises(ValueError, match="extra is not JSON"):
        checkpointer.save(1, {"n": jnp.zeros(1)}, extra={"f": object()}, metrics={})
