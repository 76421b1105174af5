"""Checkpoints: the whole carry of a run, asynchronous, atomic, verified.

A run's working directory:

    workdir/config.json            the config of the run; another config is refused
    workdir/checkpoints/120/       one checkpoint, named by its step (Orbax)
        carry/                     the arrays, by path: "learner/params/dense/kernel"
        record/                    JSON: config, extra (data position), layout, checksums, score
    workdir/damaged_checkpoints/   checkpoints that could not be read, moved out of the way

Orbax writes in the background into a directory with a temporary name and renames it at the end,
so a killed process leaves the earlier checkpoints and nothing that looks like one. What Orbax
does not do is notice a changed byte inside the array files; each leaf therefore has a CRC-32 in
the record, which `restore_latest` checks. A checkpoint that fails any check is damaged, and the
one before is used.
"""

from collections.abc import Collection, Mapping
import errno
import json
import logging
import os
import pathlib
import shutil
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mmrl_jax.training import config as config_lib

PyTree = Any

_CHECKPOINTS = "checkpoints"
_DAMAGED = "damaged_checkpoints"
_MAX_LISTED = 20

logger = logging.getLogger(__name__)


class CheckpointMismatch(ValueError):
    """The checkpoint is of another model: its paths, shapes, dtypes or key kinds differ."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""


class CheckpointDamaged(ValueError):
    """No checkpoint in the directory could be read."""


class Checkpointer:
    """Saves and restores the carry of one run.

    Use it from every process of a multi-host run, with the same arguments.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        config: config_lib.ConfigLike,
        keep: int,
        best_metric: str | None,
        save_interval: int,
        may_change: Collection[str] = (),
    ):
        """Claims the working directory for this config and opens its checkpoints.

        Args:
            workdir: Directory of the run; made if absent.
            config: Config of the run, written to `workdir/config.json` and into each checkpoint.
            keep: Number of newest checkpoints to keep, at least 1. With 1, a damaged newest
                checkpoint has none before it to fall back to.
            best_metric: Name of the metric, higher is better, whose best checkpoint is kept in
                addition; None keeps the newest only.
            save_interval: Steps between two checkpoints, at least 1.
            may_change: Config keys (or groups of keys) that a resumed run may have changed, for
                example the total number of updates.

        Raises:
            ValueError: An argument out of range, an unwritable workdir, or a workdir that holds
                a run of another config.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}, but must be at least 1 checkpoint.")
        if save_interval < 1:
            raise ValueError(f"save_interval is {save_interval}, but must be at least 1 step.")
        self._workdir = pathlib.Path(workdir).absolute()
        self._directory = self._workdir / _CHECKPOINTS
        self._config = json.loads(config_lib.to_json(config))
        self._best_metric = best_metric
        self._save_interval = save_interval
        claim_workdir(self._workdir, config, may_change=may_change)
        _make_directory(self._directory)
        self._scores: dict[int, float | None] = {
            step: _score_on_disk(self._directory, step) for step in saved_steps(self._workdir)
        }
        self._policy = _KeepNewestAndBest(keep, self._scores)
        self._manager = self._open()
        self._last_step = 0
        self._pending: int | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Says whether `save_interval` steps, or a multiple, were passed since the last save."""
        return step // self._save_interval > self._last_step // self._save_interval

    def save(
        self,
        step: int,
        carry: PyTree,
        *,
        extra: Mapping[str, Any],
        metrics: Mapping[str, float],
        force: bool = False,
    ) -> bool:
        """Saves if due, and returns before the files are written.

        The carry may be donated to a jitted function at once: what is written is a snapshot taken
        before this function returns. Call it after the metrics of this step are logged, so that a
        run killed in between does not lack that line.

        Args:
            step: Step (update) after which the carry was taken; at least 0.
            carry: Pytree whose leaves are jax arrays (PRNG keys raw or typed, any sharding) or
                numpy arrays.
            extra: What JSON can hold: data position, host counters.
            metrics: Of which `best_metric`, where present and not NaN, scores the checkpoint.
            force: Save whether or not it is due, for example at the end or on SIGTERM.

        Returns:
            Whether a save began; False also where this step was just saved.

        Raises:
            CheckpointWriteError: This or the previous, asynchronous, save failed (disk full).
            ValueError: A leaf that is not an array or is weakly typed, an `extra` that JSON cannot
                hold, or a step that is already on disk because the run was not resumed from it.
        """
        if not (force or self.due(step)) or step == self._pending:
            return False
        self.wait()
        if step in self._scores:
            if step == self._last_step:
                return False
            raise ValueError(
                f"Checkpoint {step} is already in {self._directory}: call restore_latest before "
                "training, or give a fresh workdir."
            )
        arrays, layout = _snapshot(carry)
        score = metrics.get(self._best_metric) if self._best_metric is not None else None
        score = None if score is None or np.isnan(score) else float(score)
        body = {
            "step": step,
            "score": score,
            "config": self._config,
            "extra": dict(extra),
            "layout": layout,
        }
        try:
            record = {"body": body, "crc32": _json_crc(body)}
        except TypeError as error:
            raise ValueError(f"extra holds what JSON cannot ({error}): {dict(extra)!r}.") from error
        self._scores[step] = score
        self._pending = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    carry=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record)
                ),
                force=True,
            )
        except Exception as error:
            raise self._write_error(error) from error
        self._last_step = step
        return True

    def wait(self) -> None:
        """Blocks until the save under way is on disk.

        Raises:
            CheckpointWriteError: It failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(error) from error
        self._pending = None

    def close(self) -> None:
        """Waits for the save under way and closes. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            try:
                self._manager.close()
            except Exception:  # What failed was reported by wait.
                logger.debug("Closing the checkpoint manager failed.", exc_info=True)

    def restore_latest(self, target_like: PyTree) -> tuple[PyTree, dict[str, Any], int] | None:
        """Restores the newest checkpoint that is whole, bit for bit.

        A damaged newest checkpoint is reported with a warning, moved to
        `workdir/damaged_checkpoints`, and the one before it is restored.

        Args:
            target_like: Pytree of the carry's structure. Each leaf is an array or a
                `jax.ShapeDtypeStruct`; its sharding is the one that the restored leaf gets, and
                may differ from the saved one's. Without a sharding, or for an uncommitted array,
                the leaf comes back uncommitted on the default device. A numpy leaf comes back as
                numpy.

        Returns:
            (carry, extra, step), or None where nothing was saved yet.

        Raises:
            CheckpointMismatch: The checkpoint is of another model (lists the differing paths).
            CheckpointDamaged: There are checkpoints, and none can be read.
        """
        self.wait()
        steps = saved_steps(self._workdir)
        damaged: list[tuple[int, Exception]] = []
        for step in reversed(steps):
            restored, error = _try_load(self._directory, step, {"": target_like})
            if error is not None:
                damaged.append((step, error))
                continue
            assert restored is not None
            if damaged:
                self._set_aside(damaged, used=step)
            carries, body = restored
            self._last_step = step
            return carries[""], body["extra"], step
        if damaged:
            raise _all_damaged(self._directory, damaged)
        return None

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    def _set_aside(self, damaged: list[tuple[int, Exception]], *, used: int) -> None:
        """Moves damaged steps away: a step that stays could not be saved again later."""
        for step, error in damaged:
            place = _free_name(self._workdir / _DAMAGED, str(step))
            logger.warning(
                "Checkpoint %d is damaged (%s); falling back to checkpoint %d. "
                "The damaged one was moved to %s.",
                step,
                _one_line(error),
                used,
                place,
            )
            if jax.process_index() == 0:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(self._directory / str(step), place)
            self._scores.pop(step, None)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved")
        # The manager lists the steps once, when it is made.
        self._manager.close()
        self._manager = self._open()

    def _write_error(self, error: Exception) -> CheckpointWriteError:
        step, self._pending = self._pending, None
        if step is not None:
            self._scores.pop(step, None)
        intact = [saved for saved in saved_steps(self._workdir) if saved != step]
        free = _free_bytes(self._directory)
        return CheckpointWriteError(
            f"Checkpoint {step} could not be written to {self._directory}: {_one_line(error)} "
            f"({free / 2**20:.0f} MiB free there). "
            + (f"Checkpoint {intact[-1]} is intact" if intact else "There is no earlier one")
            + ": make space or give another workdir, then start the same command again."
        )


def claim_workdir(
    workdir: str | os.PathLike[str],
    config: config_lib.ConfigLike,
    *,
    may_change: Collection[str] = (),
) -> None:
    """Writes `workdir/config.json`, or compares with the one that is there.

    Args:
        workdir: Directory of the run; made if absent.
        config: Config of the run.
        may_change: Keys, or groups of keys, in which the two may differ; the file then gets the
            new values.

    Raises:
        ValueError: The workdir cannot be written, or belongs to another config (each differing
            key is named with both values).
    """
    workdir = pathlib.Path(workdir)
    _make_directory(workdir)
    path = workdir / "config.json"
    if path.exists():
        there = config_lib.from_json(path.read_text(encoding="utf-8"))
        differences = config_lib.diff_configs(there, config)
        refused = {
            key: pair
            for key, pair in differences.items()
            if not any(key == name or key.startswith(f"{name}.") for name in may_change)
        }
        if refused:
            lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items()]
            raise ValueError(
                f"Workdir {workdir} belongs to a run of another config:\n"
                + "\n".join(lines)
                + "\nGive a fresh workdir, or the config of that run."
            )
        if not differences:
            return
    if jax.process_index() == 0:
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(config_lib.to_json(config), encoding="utf-8")
        temporary.replace(path)


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Returns the steps of the finished checkpoints of a run, in order."""
    directory = pathlib.Path(workdir) / _CHECKPOINTS
    if not directory.is_dir():
        return []
    # Orbax's temporary directories have longer names ("5.orbax-checkpoint-tmp").
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def restore_parts(
    workdir: str | os.PathLike[str], parts: Mapping[str, PyTree], *, which: str | int
) -> tuple[dict[str, PyTree], int]:
    """Restores parts of a carry, for evaluation or a warm start; changes nothing on disk.

    Args:
        workdir: Directory of a run.
        parts: Path of a part in the carry, for example "learner/params" ("" for all of it), to a
            pytree of its structure, as `target_like` in `Checkpointer.restore_latest`.
        which: "latest" (a damaged one is passed over with a warning), "best" (by the
            `best_metric` of that run), or a step.

    Returns:
        (the parts by their paths, the step of their checkpoint).

    Raises:
        ValueError: No checkpoint there, none that is `which`, or an unknown `which`.
        CheckpointMismatch: A part differs from what is given (lists the differing paths).
        CheckpointDamaged: It cannot be read.
    """
    directory = pathlib.Path(workdir).absolute() / _CHECKPOINTS
    steps = saved_steps(workdir)
    if not steps:
        raise ValueError(f"No checkpoint in {directory}: give the workdir of a run that saved one.")
    if which == "latest":
        candidates = steps[::-1]
    elif which == "best":
        scores = {step: _score_on_disk(directory, step) for step in steps}
        best = _best_step(scores)
        if best is None:
            raise ValueError(f"No checkpoint in {directory} has a score: use which='latest'.")
        candidates = [best]
    elif isinstance(which, int):
        if which not in steps:
            raise ValueError(f"No checkpoint {which} in {directory}: there are {steps}.")
        candidates = [which]
    else:
        raise ValueError(f"which is {which!r}, but must be 'latest', 'best' or a step.")
    damaged: list[tuple[int, Exception]] = []
    for step in candidates:
        restored, error = _try_load(directory, step, parts)
        if error is not None:
            damaged.append((step, error))
            continue
        assert restored is not None
        for bad, reason in damaged:
            logger.warning(
                "Checkpoint %d is damaged (%s); falling back to checkpoint %d.",
                bad,
                _one_line(reason),
                step,
            )
        return restored[0], step
    raise _all_damaged(directory, damaged)


class _KeepNewestAndBest:
    """Orbax preservation policy: the newest `keep`, and the best by score.

    Orbax's own BestN reads its metric files when a manager opens, and one damaged file stops it.
    """

    def __init__(self, keep: int, scores: Mapping[int, float | None]):
        self._keep = keep
        self._scores = scores

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self._keep :]}
        kept.add(_best_step({step: self._scores.get(step) for step in steps}))
        return [step in kept for step in steps]


def _best_step(scores: Mapping[int, float | None]) -> int | None:
    """Returns the step of the highest score, the later of equals; None without scores."""
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else None


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns {path: leaf}, as {"params/dense/kernel": ...}."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"Two leaves have the path '{name}': rename a key that holds '/'.")
        named[name] = leaf
    return named


def _is_typed_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> str:
    """Returns the name of a typed key's implementation, as "threefry2x32"."""
    kinds = []
    # key_impl takes no ShapeDtypeStruct; a traced key has the same dtype.
    jax.eval_shape(
        lambda key: kinds.append(str(jax.random.key_impl(key))),
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    )
    return kinds[0]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _json_crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _snapshot(carry: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({path: array to write}, {path: shape, dtype, crc32, and a key's kind}).

    Hazard: on CPU `np.asarray(x)`, which Orbax calls too, is a view of x's own buffer. While such
    a view lives, a donation of x is silently not done (JAX copies instead), so the live carry
    must not be touched; its copy is. Elsewhere the transfer to the host is itself the snapshot,
    and no second carry is held on the device.
    """
    arrays: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    for path, leaf in _named_leaves(carry).items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise ValueError(
                f"Carry leaf '{path}' is {leaf!r} ({type(leaf).__name__}): make it an array."
            )
        entry: dict[str, Any] = {}
        if _is_typed_key(leaf):
            entry["key"] = _key_kind(leaf)
            leaf = jax.random.key_data(leaf)
        # Orbax copies numpy arrays itself.
        if isinstance(leaf, jax.Array):
            if leaf.weak_type:
                raise ValueError(
                    f"Carry leaf '{path}' is weakly typed, which no file keeps, and a resumed run "
                    "would compile another program: give it a dtype, as in jnp.float32(0)."
                )
            if any(device.platform == "cpu" for device in leaf.devices()):
                leaf = jnp.copy(leaf)
        entry["shape"] = list(leaf.shape)
        entry["dtype"] = str(leaf.dtype)
        whole = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable
        # Of an array that spans hosts no process sees all; those files stay without a checksum.
        entry["crc32"] = _crc(jax.device_get(leaf)) if whole else None
        layout[path] = entry
        # Orbax writes no empty arrays; the layout is all there is to know of one.
        if leaf.size:
            arrays[path] = leaf
    return arrays, layout


def _read_record(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the verified body of a checkpoint's record."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        record = reader.restore(directory / str(step) / "record", args=ocp.args.JsonRestore())
    if record["crc32"] != _json_crc(record["body"]):
        raise ValueError("the checksum of its record is wrong")
    return record["body"]


def _score_on_disk(directory: pathlib.Path, step: int) -> float | None:
    try:
        return _read_record(directory, step)["score"]
    except Exception:  # A damaged record; restoring says so, here it only has no score.
        return None


def _try_load(
    directory: pathlib.Path, step: int, parts: Mapping[str, PyTree]
) -> tuple[tuple[dict[str, PyTree], dict[str, Any]] | None, Exception | None]:
    """Returns ((trees by path, record), None), or (None, the error) for a damaged checkpoint.

    All processes get the same answer: where one of them cannot read, all fall back.
    """
    restored, error = None, None
    try:
        restored = _load(directory, step, parts)
    except (CheckpointMismatch, MemoryError, PermissionError):
        raise
    except Exception as caught:
        if "RESOURCE_EXHAUSTED" in str(caught):
            raise
        error = caught
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.array(error is None))
        if not np.all(fine) and error is None:
            restored, error = None, ValueError("another process could not read it")
    return restored, error


def _load(
    directory: pathlib.Path, step: int, parts: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    body = _read_record(directory, step)
    starts = {prefix: f"{prefix}/" if prefix else "" for prefix in parts}
    targets = {
        f"{starts[prefix]}{path}": leaf
        for prefix, tree in parts.items()
        for path, leaf in _named_leaves(tree).items()
    }
    layout = {
        path: entry
        for path, entry in body["layout"].items()
        if path.startswith(tuple(starts.values()))
    }
    _check_layout(layout, targets, place=directory / str(step))
    like, arguments = {}, {}
    for path, target in targets.items():
        entry = layout[path]
        if 0 in entry["shape"]:
            continue
        sharding = _target_sharding(target)
        like[path] = jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
        arguments[path] = (
            ocp.RestoreArgs(restore_type=np.ndarray)
            if sharding is None
            else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
        )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arrays = reader.restore(
            directory / str(step) / "carry",
            args=ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=True),
        )
    leaves = {
        path: _finish_leaf(path, arrays.pop(path, None), target, layout[path])
        for path, target in targets.items()
    }
    trees = {
        prefix: jax.tree.unflatten(
            jax.tree.structure(tree),
            [leaves[f"{starts[prefix]}{path}"] for path in _named_leaves(tree)],
        )
        for prefix, tree in parts.items()
    }
    return trees, body


def _target_sharding(target: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding to restore with; None for a host array or an uncommitted one."""
    if isinstance(target, np.ndarray):
        return None
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def _finish_leaf(path: str, array: Any, target: Any, entry: Mapping[str, Any]) -> Any:
    """Verifies one restored array and gives it the target's kind (numpy, jax, typed key)."""
    if array is None:
        array = np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
        sharding = _target_sharding(target)
        if sharding is not None:
            array = jax.device_put(array, sharding)
    if entry["crc32"] is not None and (isinstance(array, np.ndarray) or array.is_fully_addressable):
        if _crc(jax.device_get(array)) != entry["crc32"]:
            raise ValueError(f"the checksum of '{path}' is wrong")
    if isinstance(target, np.ndarray):
        return np.asarray(array)
    # A copy: JAX does not donate what numpy holds a view of, as it does since the checksum.
    sharding = _target_sharding(target)
    array = (
        jnp.array(array, copy=True)
        if sharding is None
        else jax.device_put(array, sharding, may_alias=False)
    )
    return jax.random.wrap_key_data(array, impl=entry["key"]) if "key" in entry else array


def _check_layout(
    layout: Mapping[str, Any], targets: Mapping[str, Any], *, place: pathlib.Path
) -> None:
    """Compares the saved leaves with the wanted ones.

    Raises:
        CheckpointMismatch: Lists up to 20 differing paths with shape and dtype on both sides.
    """
    lines = []
    for path in sorted(layout.keys() | targets.keys()):
        saved = _describe_entry(layout[path]) if path in layout else "absent"
        wanted = _describe_leaf(path, targets[path]) if path in targets else "absent"
        if saved != wanted:
            lines.append(f"  {path}: {saved} in the checkpoint, {wanted} in the model")
    if lines:
        more = [f"  and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        raise CheckpointMismatch(
            f"Checkpoint {place} is of another model; {len(lines)} paths differ:\n"
            + "\n".join(lines[:_MAX_LISTED] + more)
            + "\nGive the config that made the checkpoint, or a fresh workdir."
        )


def _describe_entry(entry: Mapping[str, Any]) -> str:
    kind = f" ({entry['key']} key)" if "key" in entry else ""
    return f"{entry['dtype']}{list(entry['shape'])}{kind}"


def _describe_leaf(path: str, leaf: Any) -> str:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(f"Target leaf '{path}' is {leaf!r}: give an array or ShapeDtypeStruct.")
    if _is_typed_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        entry = {"dtype": data.dtype, "shape": data.shape, "key": _key_kind(leaf)}
    else:
        entry = {"dtype": np.dtype(leaf.dtype), "shape": leaf.shape}
    return _describe_entry(entry)


def _all_damaged(
    directory: pathlib.Path, damaged: list[tuple[int, Exception]]
) -> CheckpointDamaged:
    lines = [f"  {step}: {_one_line(error)}" for step, error in damaged]
    return CheckpointDamaged(
        f"No checkpoint in {directory} can be read:\n"
        + "\n".join(lines)
        + "\nGive a fresh workdir, or delete that directory to start again."
    )


def _make_directory(directory: pathlib.Path) -> None:
    """Makes a directory and writes to it once, so that a run does not find out hours later."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write_test_{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Workdir {directory} cannot be written ({error.strerror or error}): "
            + (
                "make space there or give another one."
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else "give a directory that you may write to."
            )
        ) from error


def _free_name(parent: pathlib.Path, name: str) -> pathlib.Path:
    place, i = parent / name, 2
    while place.exists():
        place, i = parent / f"{name}_{i}", i + 1
    return place


def _free_bytes(directory: pathlib.Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
