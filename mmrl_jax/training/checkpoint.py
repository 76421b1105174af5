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
import json
import logging
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from mmrl_jax import config as config_lib
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.training import integrity
from mmrl_jax.training.integrity import CheckpointMismatch
from mmrl_jax.workdir import CHECKPOINTS, saved_steps

PyTree = Any

_DAMAGED = "damaged_checkpoints"

logger = logging.getLogger(__name__)


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
        self._workdir = workdir_lib.as_path(workdir)
        self._directory = self._workdir / CHECKPOINTS
        self._config = json.loads(config_lib.to_json(config))
        self._best_metric = best_metric
        self._save_interval = save_interval
        workdir_lib.claim_workdir(self._workdir, config, may_change=may_change)
        workdir_lib.make_directory(self._directory)
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
        arrays, layout = integrity.snapshot(carry)
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
            record = {"body": body, "crc32": integrity.json_crc(body)}
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
        try:
            return ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                ),
            )
        except ImportError as error:
            raise workdir_lib.missing_package(self._directory, error) from error

    def _set_aside(self, damaged: list[tuple[int, Exception]], *, used: int) -> None:
        """Moves damaged steps away: a step that stays could not be saved again later."""
        for step, error in damaged:
            place = workdir_lib.free_name(self._workdir / _DAMAGED, str(step))
            logger.warning(
                "Checkpoint %d is damaged (%s); falling back to checkpoint %d. "
                "The damaged one was moved to %s.",
                step,
                workdir_lib.one_line(error),
                used,
                place,
            )
            if jax.process_index() == 0:
                place.parent.mkdir(parents=True, exist_ok=True)
                (self._directory / str(step)).rename(place)
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
        return CheckpointWriteError(
            f"Checkpoint {step} could not be written to {self._directory}: "
            f"{workdir_lib.one_line(error)}"
            f"{workdir_lib.free_space(self._directory)}. "
            + (f"Checkpoint {intact[-1]} is intact" if intact else "There is no earlier one")
            + ": make space or give another workdir, then start the same command again."
        )


def restore_parts(
    workdir: workdir_lib.PathLike, parts: Mapping[str, PyTree], *, which: str | int
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
    directory = workdir_lib.as_path(workdir) / CHECKPOINTS
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
                workdir_lib.one_line(reason),
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


def _read_record(directory: epath.Path, step: int) -> dict[str, Any]:
    """Returns the verified body of a checkpoint's record."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        record = reader.restore(directory / str(step) / "record", args=ocp.args.JsonRestore())
    if record["crc32"] != integrity.json_crc(record["body"]):
        raise ValueError("the checksum of its record is wrong")
    return record["body"]


def _score_on_disk(directory: epath.Path, step: int) -> float | None:
    try:
        return _read_record(directory, step)["score"]
    except Exception:  # A damaged record; restoring says so, here it only has no score.
        return None


def _try_load(
    directory: epath.Path, step: int, parts: Mapping[str, PyTree]
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
    directory: epath.Path, step: int, parts: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    body = _read_record(directory, step)
    starts = {prefix: f"{prefix}/" if prefix else "" for prefix in parts}
    targets = {
        f"{starts[prefix]}{path}": leaf
        for prefix, tree in parts.items()
        for path, leaf in integrity.named_leaves(tree).items()
    }
    layout = {
        path: entry
        for path, entry in body["layout"].items()
        if path.startswith(tuple(starts.values()))
    }
    integrity.check_layout(layout, targets, place=directory / str(step))
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
        prefix: jax.tree.unflatten(
            jax.tree.structure(tree),
            [leaves[f"{starts[prefix]}{path}"] for path in integrity.named_leaves(tree)],
        )
        for prefix, tree in parts.items()
    }
    return trees, body


def _all_damaged(directory: epath.Path, damaged: list[tuple[int, Exception]]) -> CheckpointDamaged:
    lines = [f"  {step}: {workdir_lib.one_line(error)}" for step, error in damaged]
    return CheckpointDamaged(
        f"No checkpoint in {directory} can be read:\n"
        + "\n".join(lines)
        + "\nGive a fresh workdir, or delete that directory to start again."
    )
