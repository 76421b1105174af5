"""Checkpoints of the complete carry of a run: asynchronous, atomic and verified by checksums.

The working directory of a run contains

    workdir/config.json            the config of the run; another config is rejected
    workdir/checkpoints/120/       one checkpoint, named by its step (Orbax)
        carry/                     the arrays, by path: "learner/params/dense/kernel"
        record/                    JSON: config, extra, layout, checksums, score, rollback_target
    workdir/damaged_checkpoints/   checkpoints that could not be read and were moved here

Orbax writes in the background to a directory with a temporary name and renames it at the end. A
killed process therefore leaves the earlier checkpoints intact, and no incomplete one under a final
name. Orbax does not detect a changed byte inside the array files. The record therefore has a CRC-32
of each leaf, which `restore_latest` checks. A checkpoint that fails any check counts as damaged,
and the previous one is used.
"""

from collections.abc import Collection, Mapping
import json
import logging
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from mmrl_jax import config as config_lib
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.training import integrity
from mmrl_jax.training.integrity import CheckpointMismatch
from mmrl_jax.training.retention import KeepNewestAndBest, best_step
from mmrl_jax.training.write_watch import WriteWatch
from mmrl_jax.workdir import CHECKPOINTS, saved_steps

PyTree = Any

_DAMAGED = "damaged_checkpoints"

logger = logging.getLogger(__name__)


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class CheckpointDamaged(ValueError):
    """The directory has checkpoints, but none of them could be read."""


class Checkpointer:
    """Saves and restores the carry of one run.

    All processes of a multi-host run must use it, with the same arguments.
    """

    def __init__(
        self,
        workdir: workdir_lib.PathLike,
        *,
        config: config_lib.ConfigLike,
        keep: int,
        best_metric: str | None,
        save_interval: int,
        may_change: Collection[str] = (),
    ):
        """Claims the working directory for this config and opens its checkpoints.

        Args:
            workdir: Directory of the run, which is created if it does not exist.
            config: Config of the run, which is written to `workdir/config.json` and into each
                checkpoint.
            keep: Number of newest checkpoints to keep, at least 1. With 1, there is no earlier
                checkpoint to fall back to if the newest one is damaged.
            best_metric: Name of the metric, higher is better, whose best checkpoint is kept in
                addition; None to keep the newest checkpoints only.
            save_interval: Number of steps between two checkpoints, at least 1.
            may_change: Config keys, or groups of keys, whose values may differ in a resumed run,
                for example the total number of updates.

        Raises:
            ValueError: If an argument is out of range, or the workdir cannot be written or holds a
                run of another config.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}, but must be at least 1 checkpoint.")
        if save_interval < 1:
            raise ValueError(f"save_interval is {save_interval}, but must be at least 1 step.")
        self._workdir = workdir_lib.as_path(workdir)
        self._directory = self._workdir / CHECKPOINTS
        self._config = json.loads(config_lib.to_json(config))
        self._best_metric = best_metric
        self._save_interval = save_interval
        begun = bool(saved_steps(self._workdir))
        workdir_lib.claim_workdir(self._workdir, config, may_change=may_change, begun=begun)
        workdir_lib.make_directory(self._directory)
        # A network file system may show the other processes an older list.
        steps = multihost.from_primary(saved_steps(self._workdir))
        self._scores: dict[int, float | None] = {}
        self._targets: set[int] = set()  # Steps of the checkpoints that a rollback may restore.
        for step in steps:
            self._scores[step], is_target = _stored(self._directory, step)
            self._targets |= {step} if is_target else set()
        self._policy = KeepNewestAndBest(keep, self._scores, self._targets)
        self._manager = self._open()
        self._last_step = 0
        self._pending: int | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        # Without this process, or with one that is lost, Orbax would wait for minutes.
        several = jax.process_count() > 1 and isinstance(error, CheckpointWriteError)
        if not several and (error is None or not multihost.is_lost(error)):
            self.close()

    def due(self, step: int) -> bool:
        """Returns whether a multiple of `save_interval` was passed since the last due save.

        Other saves do not count, so that a run saves the same steps however often it is stopped.
        """
        last = max((saved for saved in self._targets if saved <= self._last_step), default=0)
        return step // self._save_interval > last // self._save_interval

    def save(
        self,
        step: int,
        carry: PyTree,
        *,
        extra: Mapping[str, Any],
        metrics: Mapping[str, float],
        force: bool = False,
        is_good: bool = True,
    ) -> bool:
        """Saves the carry if a save is due, and returns before the files are written.

        The carry may be donated to a jitted function immediately, because a snapshot is taken
        before this function returns. Call it after the metrics of this step are logged, so that
        they are not missing if the run is killed in between.

        Args:
            step: Step (update) after which the carry was taken, at least 0.
            carry: Pytree whose leaves are JAX arrays with any sharding, including raw and typed
                PRNG keys, or numpy arrays.
            extra: JSON-serializable values that are stored too: data position, host counters.
            metrics: Metrics of this step. The value of `best_metric`, if present and not NaN, is
                the score of the checkpoint.
            force: Whether to save even if no save is due, for example at the end or on SIGTERM.
            is_good: Whether a rollback may restore the checkpoint, if its save was due or its step
                is 0.

        Returns:
            Whether a save was started. It is False if this step is already saved.

        Raises:
            CheckpointWriteError: If this save, or the previous asynchronous one, failed, for
                example because the disk is full.
            ValueError: If a leaf is not an array or is weakly typed, `extra` is not
                JSON-serializable, or the step is already on disk because the run was not resumed
                from it.
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
        arrays, layout = integrity.snapshot(carry)
        score = metrics.get(self._best_metric) if self._best_metric is not None else None
        score = None if score is None or np.isnan(score) else float(score)
        body = {
            "step": step,
            "score": score,
            "rollback_target": is_good and (step == 0 or self.due(step)),
            "config": self._config,
            "extra": dict(extra),
            "layout": layout,
        }
        try:
            record = {"body": body, "crc32": integrity.json_crc(body)}
        except TypeError as error:
            raise ValueError(
                f"extra is not JSON-serializable ({error}): {dict(extra)!r}."
            ) from error
        self._scores[step] = score
        self._targets |= {step} if body["rollback_target"] else set()
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
        """Blocks until the pending save is on disk.

        Raises:
            CheckpointWriteError: If the save failed.
        """
        try:
            self._watch.wait(self._manager)
        except Exception as error:
            raise self._write_error(error) from error
        self._pending = None

    def close(self) -> None:
        """Waits for the pending save and closes the checkpoints.

        Raises:
            CheckpointWriteError: If the save failed.
        """
        try:
            self.wait()
        finally:
            try:
                self._manager.close()
            except Exception:  # `wait` has reported the failure.
                logger.debug("Closing the checkpoint manager failed.", exc_info=True)

    def restore_latest(
        self, target_like: PyTree, *, rollback: bool = False
    ) -> tuple[PyTree, dict[str, Any], int] | None:
        """Restores the newest undamaged checkpoint bit for bit.

        If the newest checkpoint is damaged, a warning reports it, it is moved to
        `workdir/damaged_checkpoints`, and the previous one is restored.

        Args:
            target_like: Pytree with the structure of the carry. Each leaf is an array or a
                `jax.ShapeDtypeStruct`, whose sharding is applied to the restored leaf and may
                differ from the sharding with which it was saved. If the target has no sharding, or
                is an uncommitted array, the restored leaf is uncommitted on the default device. If
                it is a numpy array, so is the restored leaf.
            rollback: Whether only a checkpoint that a rollback may restore is considered. Later
                checkpoints are then deleted, so that the run can save these steps again.

        Returns:
            (carry, extra, step), or None if there is no checkpoint.

        Raises:
            CheckpointMismatch: If the checkpoint is of another model; the message lists the
                differing paths.
            CheckpointDamaged: If there are checkpoints, but none can be read.
        """
        self.wait()
        steps = multihost.from_primary(saved_steps(self._workdir))
        damaged: list[tuple[int, Exception]] = []
        for step in reversed(steps):
            if rollback and step not in self._targets:
                continue
            restored, error = _try_load(self._directory, step, {"": target_like})
            if error is not None:
                damaged.append((step, error))
                continue
            assert restored is not None
            if damaged:
                self._set_aside(damaged, used=step)
            if rollback:
                self._delete_after(step)
            carries, body = restored
            self._last_step = step
            return carries[""], body["extra"], step
        if damaged:
            raise _all_damaged(self._directory, damaged)
        return None

    def _delete_after(self, step: int) -> None:
        for later in [saved for saved in self._manager.all_steps() if saved > step]:
            self._manager.delete(later)
        for later in [saved for saved in self._scores if saved > step]:
            self._forget(later)  # Also those that are not kept any more.

    def _forget(self, step: int) -> None:
        self._scores.pop(step, None)
        self._targets.discard(step)

    def _open(self) -> ocp.CheckpointManager:
        self._watch = WriteWatch()
        try:
            return ocp.CheckpointManager(
                self._directory,
                handler_registry=self._watch.handlers(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                ),
            )
        except ImportError as error:
            raise workdir_lib.missing_package(self._directory, error) from error

    def _set_aside(self, damaged: list[tuple[int, Exception]], *, used: int) -> None:
        """Moves damaged checkpoints away, so that their steps can be saved again later."""
        for step, error in damaged:
            target = workdir_lib.free_name(self._workdir / _DAMAGED, str(step))
            logger.warning(
                "Checkpoint %d is damaged (%s); falling back to checkpoint %d. "
                "The damaged one was moved to %s.",
                step,
                workdir_lib.one_line(error),
                used,
                target,
            )
            if multihost.is_primary():
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._directory / str(step)).rename(target)
            self._forget(step)
        multihost.any_process(False)  # All processes wait until process 0 has moved them.
        # The manager lists the steps only once, when it is created.
        self._manager.close()
        self._manager = self._open()

    def _write_error(self, error: Exception) -> CheckpointWriteError:
        step, self._pending = self._pending, None
        if step is not None:
            self._forget(step)
        intact = [saved for saved in saved_steps(self._workdir) if saved != step]
        return CheckpointWriteError(
            f"Checkpoint {step} could not be written to {self._directory}: "
            f"{workdir_lib.one_line(error)}"
            f"{workdir_lib.free_space(self._directory)}. "
            + (f"Checkpoint {intact[-1]} is intact" if intact else "There is no earlier checkpoint")
            + ": free disk space or give another workdir, then run the same command again."
        )


def restore_parts(
    workdir: workdir_lib.PathLike, parts: Mapping[str, PyTree], *, which: str | int
) -> tuple[dict[str, PyTree], int]:
    """Restores parts of a carry, for evaluation or initialization, without changing files.

    Args:
        workdir: Directory of a run.
        parts: Target pytrees, as `target_like` in `Checkpointer.restore_latest`, by the path of a
            part of the carry, for example "learner/params", or "" for the whole carry.
        which: "latest" for the newest undamaged checkpoint (damaged ones are skipped with a
            warning), "best" for the best one by the `best_metric` of the run, or a step.

    Returns:
        (restored parts by their paths, step of the checkpoint).

    Raises:
        ValueError: If the directory has no checkpoint, or none that is `which`, or `which` is
            invalid.
        CheckpointMismatch: If a part differs from its target; the message lists the differing
            paths.
        CheckpointDamaged: If no such checkpoint can be read.
    """
    directory = workdir_lib.as_path(workdir) / CHECKPOINTS
    steps = multihost.from_primary(saved_steps(workdir))
    if not steps:
        raise ValueError(f"No checkpoint in {directory}: give the workdir of a run that saved one.")
    if which == "latest":
        candidates = steps[::-1]
    elif which == "best":
        scores = {step: _stored(directory, step)[0] for step in steps}
        best = best_step(scores)
        if best is None:
            raise ValueError(f"No checkpoint in {directory} has a score: use which='latest'.")
        candidates = [best]
    elif isinstance(which, int):
        if which not in steps:
            raise ValueError(f"No checkpoint {which} in {directory}: available steps are {steps}.")
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
                workdir_lib.one_line(reason),
                step,
            )
        return restored[0], step
    raise _all_damaged(directory, damaged)


def _read_record(directory: epath.Path, step: int) -> dict[str, Any]:
    """Returns the verified body of a checkpoint's record."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        record = reader.restore(directory / str(step) / "record", args=ocp.args.JsonRestore())
    if record["crc32"] != integrity.json_crc(record["body"]):
        raise ValueError("the checksum of its record is wrong")
    return record["body"]


def _stored(directory: epath.Path, step: int) -> tuple[float | None, bool]:
    """Returns the score of a checkpoint, and whether a rollback may restore it."""
    try:
        body = _read_record(directory, step)
    except Exception:  # The record is damaged, which is reported when it is restored.
        return None, False
    return body["score"], body.get("rollback_target", True)


def _try_load(
    directory: epath.Path, step: int, parts: Mapping[str, PyTree]
) -> tuple[tuple[dict[str, PyTree], dict[str, Any]] | None, Exception | None]:
    """Returns ((trees by path, record), None), or (None, the error) for a damaged checkpoint.

    All processes get the same result: if one of them cannot read a checkpoint, all fall back.
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
    if multihost.any_process(error is not None) and error is None:
        restored, error = None, ValueError("another process could not read it")
    return restored, error


def _load(
    directory: epath.Path, step: int, parts: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    body = _read_record(directory, step)
    prefixes = {part: f"{part}/" if part else "" for part in parts}
    targets = {
        f"{prefixes[part]}{path}": leaf
        for part, tree in parts.items()
        for path, leaf in integrity.named_leaves(tree).items()
    }
    layout = {
        path: entry
        for path, entry in body["layout"].items()
        if path.startswith(tuple(prefixes.values()))
    }
    integrity.check_layout(layout, targets, checkpoint=directory / str(step))
    like, arguments = {}, {}
    for path, target in targets.items():
        entry = layout[path]
        if 0 in entry["shape"]:
            continue
        sharding = integrity.target_sharding(target)
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
        path: integrity.finish_leaf(path, arrays.pop(path, None), target, layout[path])
        for path, target in targets.items()
    }
    trees = {
        part: jax.tree.unflatten(
            jax.tree.structure(tree),
            [leaves[f"{prefixes[part]}{path}"] for path in integrity.named_leaves(tree)],
        )
        for part, tree in parts.items()
    }
    return trees, body


def _all_damaged(directory: epath.Path, damaged: list[tuple[int, Exception]]) -> CheckpointDamaged:
    lines = [f"  {step}: {workdir_lib.one_line(error)}" for step, error in damaged]
    return CheckpointDamaged(
        f"No checkpoint in {directory} can be read:\n"
        + "\n".join(lines)
        + "\nGive a fresh workdir, or delete that directory to start again."
    )
