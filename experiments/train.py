r"""Trains a policy as a config says; the same command again goes on from the last checkpoint.

  python -m experiments.train --config=configs/reach_ppo.py --workdir=runs/reach \
      [--config.ppo.clip=0.1] [--config.seed=1]

Writes to the workdir:
  summary.json          final success (return, where an environment has no success) on the training
                        split with its 95 % interval, from the last evaluation; times; steps
  metrics.jsonl         what was logged; learning_curves.png shows it, tensorboard/ has it too
  checkpoints/          the newest ones and the best
  config.json           the config; a workdir of another config is refused
  samples.html          of policies that answer questions: pictures, questions, answers, rewards
  warm_start/           the same of a warm start before PPO; sft/, of fine-tuning before RL

Ctrl-C or SIGTERM saves and stops. Training that diverged ends with an error and exit code 1.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
import types
from typing import Any

from absl import app, flags, logging
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
    folder_factory,
    glossary,
    loop,
    metrics,
    question_factory,
    report,
    token_models,
)
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import workdir as workdir_lib
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
    rewards.NoRewards,
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves in memory: the demonstrations and how each stage ended.

    `warm_start` is of cloning or of supervised fine-tuning, `tuned` of RL.
    """

    demonstrations: Demonstrations | None
    warm_start: Result | None
    tuned: Result | None

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


def prepare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Checks the config and claims the workdir for it.

    Raises:
      ValueError: the config cannot run, or the workdir is another config's or cannot be written.
    """
    factory_of(config).check(config)
    workdir_lib.claim_workdir(workdir, config, may_change=loop.MAY_CHANGE)


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> Trained:
    """Runs the stages of a config, each resumed from its newest checkpoint.

    Writes what the module's docstring lists; summary.json only if nothing interrupted it.

    Raises:
      ValueError: see `prepare`.
      FloatingPointError: training diverged.
      NoRewards: a user's reward functions failed for all answers of an update.
    """
    started = time.perf_counter()
    workdir = pathlib.Path(workdir)
    prepare(config, workdir)
    stages = control_stages if factory_of(config) is factory else token_stages
    trained = stages(config, workdir)
    if not trained.interrupted and jax.process_index() == 0:
        summary = final_evaluation(workdir) | totals(trained.results, started)
        write_json(workdir / "summary.json", summary)
    return trained


def control_stages(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Trained:
    """Cloning and PPO, whichever the config asks for."""
    mesh = factory.make_mesh(config)
    data, warm, tuned = None, None, None
    if config.warm_start.updates:
        place = workdir if config.algorithm == "bc" else workdir / "warm_start"
        data, success = factory.record_demonstrations(config)
        print(
            f"{config.warm_start.episodes} demonstrated episodes of an expert that succeeds in "
            f"{success:.0%} of them.",
            flush=True,
        )
        warm = loop.run(factory.cloning_stage(config, mesh, data), workdir=place, config=config)
        draw_curves(place, x="progress/updates")
    if config.algorithm == "ppo" and not (warm is not None and warm.interrupted):
        start = warm.carry.learner if warm is not None else None
        tuned = loop.run(
            factory.ppo_stage(config, mesh, start=start), workdir=workdir, config=config
        )
        draw_curves(workdir, x="progress/env_steps")
    return Trained(data, warm, tuned)


def token_stages(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Trained:
    """Supervised fine-tuning and RL, whichever the config asks for."""
    build, mesh, warm, tuned = factory_of(config), factory.make_mesh(config), None, None
    if config.sft.updates:
        place = workdir if config.algorithm == "sft" else workdir / "sft"
        warm = loop.run(build.sft_stage(config, mesh), workdir=place, config=config)
        draw_curves(place, x="progress/updates")
    if config.algorithm != "sft" and not (warm is not None and warm.interrupted):
        start = warm.carry.learner.params if warm is not None else None
        tuned = loop.run(build.rl_stage(config, mesh, start=start), workdir=workdir, config=config)
        draw_curves(workdir, x="progress/updates")
    trained = Trained(None, warm, tuned)
    # What agents do is shown by no question.
    if build is not agent_factory and not trained.interrupted and jax.process_index() == 0:
        samples = build.answered_samples(config, acting(config, trained), SAMPLES)
        report.sample_table(workdir / "samples.html", samples, f"{workdir.name}: answers")
    return trained


def acting(config: ml_collections.ConfigDict, trained: Trained) -> Any:
    """What the policy of the last stage is made of, as its factory's evaluations want it."""
    build, learner = factory_of(config), trained.results[-1].carry.learner
    if build is factory:
        return learner.without_optimiser()
    warm, tuned = trained.warm_start, trained.tuned
    return token_models.made_of(
        config,
        build.make_parts(config).model,
        learner.params,
        start=None if warm is None or tuned is None else warm.carry.learner.params,
        stage="sft" if tuned is None else "rl",
    )


def draw_curves(workdir: pathlib.Path, *, x: str) -> None:
    """Draws a stage's learning_curves.png; not of a stage stopped before it logged anything."""
    path = workdir / metrics.JSONL_NAME
    if jax.process_index() == 0 and metrics.read_jsonl(path):
        report.learning_curves(path, workdir / "learning_curves.png", x=x)


def final_evaluation(workdir: pathlib.Path) -> dict[str, float]:
    """'final/<split>/success', '_lo' and '_hi', as a stage last logged them.

    Where there is no success it is 'return', or for questions 'accuracy'.
    """
    rows = metrics.read_jsonl(workdir / metrics.JSONL_NAME)
    row = next(row for row in reversed(rows) if any(name.startswith("eval/") for name in row))
    for score in ("success", "accuracy", "return"):
        found = [name for name in row if glossary.matches(f"eval/<split>/{score}", name)]
        if found:
            break
    name = found[0].removeprefix("eval/")
    return {f"final/{name}{end}": row[f"eval/{name}{end}"] for end in ("", "_lo", "_hi")}


def totals(results: Sequence[Result], started: float) -> dict[str, float]:
    """Times and steps of a run of several stages.

    Args:
      results: of the stages.
      started: time.perf_counter() when this process began the run.

    Returns:
      wall_s: all that this process took, and what earlier ones took for the stages, up to the
        checkpoints from which this one went on.
      compile_s: of initialising and compiling the stages, of all processes.
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


def write_json(path: pathlib.Path, values: dict[str, float]) -> None:
    """Writes a flat dictionary in one atomic replacement."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


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
    workdir = pathlib.Path(FLAGS.workdir)
    # A ValueError from training itself would be a fault of the code, and keeps its stack.
    with clean_exit(ValueError):
        prepare(FLAGS.config, workdir)
    with clean_exit(*FAILURES):
        trained = train(FLAGS.config, workdir)
    ended = "interrupted; the same command goes on" if trained.interrupted else "done"
    print(f"Training {ended}. Outputs: {workdir}")


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
    flags.mark_flags_as_required(["config", "workdir"])
    with clean_exit(ValueError):
        config_lib.validate_overrides(sys.argv, elsewhere=control_models.ELSEWHERE)
    logging.set_verbosity(logging.WARNING)
    app.run(main)
