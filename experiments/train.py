r"""Trains a policy as a config says; the same command again goes on from the last checkpoint.

  python -m experiments.train --config=configs/reach_ppo.py --workdir=runs/reach \
      [--config.ppo.clip=0.1] [--config.seed=1]

Writes to the workdir:
  summary.json          final success (return, where an environment has no success) on the training
                        split with its 95 % interval, from the last evaluation; for a folder the
                        return on its test split, which chooses no checkpoint; times; steps
  metrics.jsonl         what was logged; learning_curves.png shows it, tensorboard/ has it too
  checkpoints/          the newest ones and the best
  config.json           the config; a workdir of another config is refused
  run.json              fingerprints of what the run depends on beside it, see --accept_changes
  lock.json             while a process runs there: which one
  samples.html          of policies that answer questions: pictures, questions, answers, rewards
  warm_start/           the same of a warm start before PPO; sft/, of fine-tuning before RL

Ctrl-C or SIGTERM saves and stops. Training that diverged, or whose rewards or records fail each
time they are tried, ends with an error and exit code 1. An evaluation or report that fails is a
message.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import sys
import time
import types
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax
import ml_collections
from ml_collections import config_flags

from mmrl_jax import envs
from mmrl_jax.learners.bc import Demonstrations
from mmrl_jax.tasks import rewards
from mmrl_jax.training import (
    agent_factory,
    checkpoint,
    control_models,
    factory,
    fingerprints,
    folder_factory,
    loop,
    metric_definitions,
    metrics,
    question_factory,
    report,
)
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import workdir as workdir_lib
from mmrl_jax.training.lock import locked
from mmrl_jax.training.loop import Result

FLAGS = flags.FLAGS
SAMPLES = 24  # Questions in samples.html.
# What can end a run through no fault of the code: the message says all, a stack nothing.
FAILURES = (
    FloatingPointError,
    checkpoint.CheckpointDamaged,
    checkpoint.CheckpointMismatch,
    checkpoint.CheckpointWriteError,
    envs.InvalidEnvironment,
    loop.HostFailed,
    rewards.NoRewards,
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves in memory: how each stage ended, and what its last one needs besides.

    Attributes:
      warm_start: of cloning or of supervised fine-tuning. Its carry is None where RL followed,
        which no copy of it is kept beside; its checkpoints hold it.
      tuned: of RL.
      demonstrations: on the host; None where none were recorded.
      frozen: half of the variables of the last stage of a token policy, on its devices.
      tested: metrics of the test split of a folder, by their logged names; empty without one.
    """

    warm_start: Result | None
    tuned: Result | None
    demonstrations: Demonstrations | None = None
    frozen: Any = None
    tested: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def results(self) -> tuple[Result, ...]:
        """Of the stages that ran, in order."""
        return tuple(r for r in (self.warm_start, self.tuned) if r is not None)

    @property
    def interrupted(self) -> bool:
        """A SIGTERM or SIGINT came: nothing more should be started."""
        return any(result.interrupted for result in self.results)


def factory_of(config: ml_collections.ConfigDict) -> types.ModuleType:
    """What builds the runs of a config: of control policies, or of those that write text.

    A config of questions has a task, or a folder of them; one of an agent that writes has an
    environment and `sft`.
    """
    if "folder" in config:
        return folder_factory
    if "task" in config:
        return question_factory
    return agent_factory if "sft" in config else factory


def prepare(
    config: ml_collections.ConfigDict, workdir: epath.Path, *, accept: Collection[str] = ()
) -> contextlib.AbstractContextManager[object]:
    """Checks the config and claims the workdir for it.

    Args:
      config: of the run.
      workdir: of the run.
      accept: changes of what the run depends on that are meant, see `fingerprints.check`.

    Returns:
      The lock of the workdir, held until its context is left.

    Raises:
      ValueError: the config cannot run, or the workdir is another config's, is in use by another
        process, or cannot be written, or what the run depends on has changed.
    """
    factory_of(config).check(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(workdir))
        fixed = factory.fixed_on_resume(config) if workdir_lib.saved_steps(workdir) else {}
        workdir_lib.claim_workdir(workdir, config, may_change=loop.MAY_CHANGE, fixed=fixed)
        depends_on = factory_of(config).dependencies(config)
        # What has trained nothing yet depends on nothing.
        if any(workdir_lib.saved_steps(workdir / stage) for stage in ("", "sft", "warm_start")):
            fingerprints.check(workdir, depends_on, accept=accept)
        stage = config.algorithm if config.algorithm in ("sft", "bc") else "rl"
        fingerprints.write(workdir, fingerprints.Run(stage, depends_on))
        return stack.pop_all()


def train(
    config: ml_collections.ConfigDict,
    workdir: workdir_lib.PathLike,
    *,
    accept: Collection[str] = (),
) -> Trained:
    """Runs the stages of a config, each resumed from its newest checkpoint.

    Writes what the module's docstring lists; summary.json only if nothing interrupted it.

    Args:
      config: of the run.
      workdir: of the run.
      accept: see `prepare`.

    Raises:
      ValueError: see `prepare`.
      FloatingPointError: training diverged.
      HostFailed: a user's reward functions, or files, failed each time that an update asked.
    """
    started = time.perf_counter()
    workdir = workdir_lib.as_path(workdir)
    with prepare(config, workdir, accept=accept):
        stages = control_stages if factory_of(config) is factory else token_stages
        trained = stages(config, workdir)
        if not trained.interrupted and jax.process_index() == 0:
            with report.surviving("Writing summary.json"):
                summary = final_evaluation(workdir, trained.tested)
                write_json(workdir / "summary.json", summary | totals(trained.results, started))
    return trained


def control_stages(config: ml_collections.ConfigDict, workdir: epath.Path) -> Trained:
    """Cloning and PPO, whichever the config asks for."""
    mesh = factory.make_mesh(config)
    data, start, warm, tuned = None, None, None, None
    if config.warm_start.updates:
        place = workdir if config.algorithm == "bc" else workdir / "warm_start"
        fingerprints.write(place, fingerprints.Run("bc", factory.dependencies(config)))
        data, success = factory.record_demonstrations(config)
        data = jax.device_get(data)  # The devices have them for as long as the stage runs.
        print(
            f"{config.warm_start.episodes} demonstrated episodes of an expert that succeeds in "
            f"{success:.0%} of them.",
            flush=True,
        )
        warm = loop.run(factory.cloning_stage(config, mesh, data), workdir=place, config=config)
        draw_curves(place, x="progress/updates")
    if config.algorithm == "ppo" and not (warm is not None and warm.interrupted):
        if warm is not None:
            start = warm.carry.learner.without_optimizer()
            warm = dataclasses.replace(warm, carry=None)
        stage = factory.ppo_stage(config, mesh, start=start)
        start = None  # The stage alone has it, and lets it go.
        tuned = loop.run(stage, workdir=workdir, config=config)
        draw_curves(workdir, x="progress/env_steps")
    return Trained(warm, tuned, demonstrations=data)


def token_stages(config: ml_collections.ConfigDict, workdir: epath.Path) -> Trained:
    """Supervised fine-tuning and RL, whichever the config asks for."""
    build, mesh = factory_of(config), factory.make_mesh(config)
    start, frozen, warm, tuned = None, None, None, None
    if config.sft.updates:
        place = workdir if config.algorithm == "sft" else workdir / "sft"
        fingerprints.write(place, fingerprints.Run("sft", build.dependencies(config)))
        stage = build.sft_stage(config, mesh)
        warm = loop.run(stage, workdir=place, config=config)
        frozen = stage.constants[0]
        draw_curves(place, x="progress/updates")
    if config.algorithm != "sft" and not (warm is not None and warm.interrupted):
        if warm is not None:
            start, warm = warm.carry.learner.params, dataclasses.replace(warm, carry=None)
        # What fine-tuning held on the devices goes before RL's takes its place.
        stage = frozen = None
        stage = build.rl_stage(config, mesh, start=start)
        start = None  # The stage alone has it, and lets it go.
        tuned = loop.run(stage, workdir=workdir, config=config)
        frozen = stage.constants
        draw_curves(workdir, x="progress/updates")
    trained = Trained(warm, tuned, frozen=frozen)
    # What agents do is shown by no question.
    if build is not agent_factory and not trained.interrupted and jax.process_index() == 0:
        with report.surviving("Writing samples.html"):
            if build is folder_factory:
                samples, tested = build.tested_samples(
                    config, final_variables(config, trained), SAMPLES
                )
                trained = dataclasses.replace(trained, tested=tested)
            else:
                samples = build.answered_samples(config, final_variables(config, trained), SAMPLES)
            report.sample_table(workdir / "samples.html", samples, f"{workdir.name}: answers")
    return trained


def final_variables(config: ml_collections.ConfigDict, trained: Trained) -> Any:
    """What the policy of the last stage is made of, as its factory's evaluations want it."""
    learner = trained.results[-1].carry.learner
    if factory_of(config) is factory:
        return learner.without_optimizer()
    return learner.params, trained.frozen


def draw_curves(workdir: epath.Path, *, x: str) -> None:
    """Draws a stage's learning_curves.png; not of a stage stopped before it logged anything."""
    path = workdir / metrics.JSONL_NAME
    with report.surviving("Drawing learning_curves.png"):
        if jax.process_index() == 0 and metrics.read_jsonl(path):
            report.learning_curves(path, workdir / "learning_curves.png", x=x)


def final_evaluation(workdir: epath.Path, tested: Mapping[str, float]) -> dict[str, float]:
    """'final/<split>/success', '_lo' and '_hi', of a test split or as a stage last logged them.

    Where there is no success it is 'return', or for questions 'accuracy'; for a folder there is
    'failed_fraction' too. There is nothing, and a message, where the last row has no evaluation: it
    failed, or metrics.jsonl was deleted.

    Args:
      workdir: of the stage.
      tested: metrics of a test split by their logged names; empty where there is none.
    """
    rows = metrics.read_jsonl(workdir / metrics.JSONL_NAME)
    # An evaluation of earlier parameters is none of what the run became.
    row = tested or (rows[-1] if rows and any(map(_is_evaluation, rows[-1])) else None)
    if row is None:
        print(
            f"summary.json has no final evaluation, for the last row of "
            f"{workdir / metrics.JSONL_NAME} has none: "
            f"python -m experiments.evaluate --workdir={workdir}",
            file=sys.stderr,
            flush=True,
        )
        return {}
    for score in ("success", "accuracy", "return"):
        found = [name for name in row if metric_definitions.matches(f"eval/<split>/{score}", name)]
        if found:
            break
    name = found[0].removeprefix("eval/")
    final = {f"final/{name}{end}": row[f"eval/{name}{end}"] for end in ("", "_lo", "_hi")}
    failed = f"{name.rpartition('/')[0]}/failed_fraction"
    return final | ({f"final/{failed}": row[f"eval/{failed}"]} if f"eval/{failed}" in row else {})


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval/") and name != "eval/failed"


def totals(results: Sequence[Result], started: float) -> dict[str, float]:
    """Times and steps of a run of several stages.

    Args:
      results: of the stages.
      started: time.perf_counter() when this process began the run.

    Returns:
      wall_s: all that this process took, and what earlier ones took for the stages, up to the
        checkpoints from which this one went on.
      compile_s: of initializing and compiling the stages, of all processes.
      env_steps: decisions of the policy in environments while training; a step that only resets
        is none.
      env_steps_per_s: env_steps over the time of the updates that took them; 0 without any.
    """
    stepping = [result for result in results if result.counters.env_steps]
    steps = sum(result.counters.env_steps for result in stepping)
    return {
        "wall_s": time.perf_counter() - started + sum(result.earlier_s for result in results),
        "compile_s": sum(result.counters.compile_s for result in results),
        "env_steps": steps,
        "env_steps_per_s": steps / sum(result.wall_s for result in stepping) if stepping else 0.0,
    }


def write_json(path: epath.Path, values: dict[str, float]) -> None:
    """Writes a flat dictionary in one atomic replacement; what is not finite becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    workdir_lib.write_text(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def clean_exit(*errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into 'error: <message>' on standard error and exit code 1."""
    try:
        yield
    except errors as error:
        sys.exit(f"error: {error}")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    # A ValueError from training itself would be a fault of the code, and keeps its stack.
    with clean_exit(ValueError):
        workdir = workdir_lib.as_path(FLAGS.workdir)
        lock = prepare(FLAGS.config, workdir, accept=FLAGS.accept_changes)
    with lock, clean_exit(*FAILURES):
        trained = train(FLAGS.config, workdir, accept=FLAGS.accept_changes)
    ended = "interrupted; the same command goes on" if trained.interrupted else "done"
    print(f"Training {ended}. Outputs: {FLAGS.workdir}")


if __name__ == "__main__":
    for kind, build in (
        ("control policies", factory),
        ("policies that answer questions", question_factory),
        ("policies that answer questions from a folder", folder_factory),
        ("agents that write their actions", agent_factory),
    ):
        __doc__ += f"\nKeys of {kind}, each set by --config.<key>=<value>:\n\n"
        __doc__ += f"{config_lib.describe_schema(build.SCHEMA)}\n"
    config_flags.DEFINE_config_file("config", None, "File of the config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory that gets all outputs.")
    flags.DEFINE_list(
        "accept_changes",
        [],
        "Of a run that is resumed: what may have changed since it began, "
        f"{', '.join(fingerprints.ACCEPTABLE)}.",
    )
    flags.mark_flags_as_required(["config", "workdir"])
    with clean_exit(ValueError):
        config_lib.validate_overrides(sys.argv, elsewhere=control_models.ELSEWHERE)
    logging.set_verbosity(logging.WARNING)
    app.run(main)
