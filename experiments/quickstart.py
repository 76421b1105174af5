"""Trains reach_ppo with behavior cloning and PPO, compares and evaluates the stages, and reports.

  python -m experiments.quickstart
  python -m experiments.quickstart --preset=small     # in less than half of the time

The command first says how long it takes on this machine. It writes to the workdir, by default
runs/quickstart, or runs/quickstart_small with the small preset:
  summary.json          all printed metrics:
                        <stage>/<split>/[shuffled_<modality>/]success with its 95 % interval _lo,
                        _hi, of expert, chance, warm_start, more_cloning and final (PPO); times
  success.png           success over time: warm start, PPO, and more cloning instead of PPO
  episodes.mp4          episodes of the final policy, with their instructions as captions
  episode.png           one episode as a strip of frames
  metrics.jsonl, tensorboard/, learning_curves.png, checkpoints/   of PPO
  bc/, more_cloning/    the same files of the warm start and of more cloning

Ctrl-C or SIGTERM saves and stops; the same command resumes.
"""

from collections.abc import Mapping
import functools
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections

from experiments.quickstarts import (
    define_flags,
    rate,
    record,
    run,
    run_longer,
    smaller,
    update_seconds,
)
from mmrl_jax import problems, runs
from mmrl_jax.commands.common import run_command
from mmrl_jax.configs import reach_ppo
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.envs import language_reach
from mmrl_jax.envs.brax_api import State
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.evaluate import Evaluator, Modality, describe
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.problems import problem as problem_lib
from mmrl_jax.problems.control import Control, make_env
from mmrl_jax.reporting import report
from mmrl_jax.reporting import summary as summary_lib
from mmrl_jax.reporting.episodes import write_episodes
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction
from mmrl_jax.training import checkpoint

# Modalities that are shuffled in the evaluation of the final policy.
SHUFFLED: tuple[Modality, ...] = ("pixels", "instruction")
SCRIPTED = ("expert/{split}", "chance/{split}/random_object", "chance/{split}/fixed_object")
# Changes of each preset to reach_ppo. The number of demonstrations, which a resumed run cannot
# change, differs, so that a run of one preset is never resumed with another.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {
        "bc": {
            "num_updates": 500, "episodes": 10240, "eval_interval": 250, "checkpoint_interval": 250,
        },
        "ppo": {"num_updates": 33, "eval_interval": 11},
    },
}  # fmt: skip
# Fraction of a PPO update that is learning, see the benchmark `loop`; cloning is learning alone.
LEARNING = 0.7
# Demonstrations, evaluations and videos take as long as this many PPO updates, and compilation as
# many seconds (of 81 s in all, where an update takes 0.9 s: two cores of an AMD EPYC).
OTHER_UPDATES, COMPILATION_S = 34, 50
WORKDIRS = {"full": "runs/quickstart", "small": "runs/quickstart_small"}


def scripted(problem: Control, which: jax.Array) -> PolicyFunction:
    """Returns the policy function with the name SCRIPTED[which]: the expert, or chance.

    Chance is a perfect controller that does not know the target object. It moves to a random
    object, or to the first one on the table.

    Args:
      problem: Problem of the run.
      which: Index into SCRIPTED, int32 [], which may be traced.
    """
    expert = problem.expert("bc")

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        active = state.info["objects"]["active"]
        # The choice is constant over an episode: it depends on its key and episode number only.
        keys = jax.vmap(jax.random.fold_in)(state.info["key"], state.info["episode"] + 1)
        scores = active * jax.vmap(lambda k: jax.random.uniform(k, active.shape[1:]))(keys)
        chosen = jnp.argmax(jnp.where(which == 1, scores, active), axis=1)
        positions = state.info["objects"]["position"][jnp.arange(chosen.shape[0]), chosen, :2]
        retargeted = state.replace(info=state.info | {"privileged": {"target_place": positions}})
        chance = language_reach.expert_action(retargeted, rng, gain=4.0, undershoot=0.0, noise=0.0)
        output = expert(state, rng)
        action = jnp.where(which == 0, output.action, chance)
        return output._replace(environment_action=action, action=action)

    return policy


def evaluate_scripted(summary: dict[str, float], problem: Control) -> None:
    """Adds the success rates of the expert and of chance on the training split to the summary."""
    split = problem.config.env.split
    evaluator = Evaluator(
        lambda split: make_env(problem.config, split=split),
        functools.partial(scripted, problem),
        _evaluation_key(problem),
        episodes=problem.config.run.eval_episodes,
        mesh=problem.mesh,
    )
    for i, name in enumerate(SCRIPTED):
        record(summary, name.format(split=split), describe(evaluator(jnp.int32(i), split)))


def evaluate_stages(
    summary: dict[str, float],
    problem: Control,
    learners: Mapping[str, LearnerState],
) -> None:
    """Adds the success rates of the trained policies to the summary.

    'warm_start' and 'final' are evaluated on all splits, and 'more_cloning' on the training split.
    On the training split, 'final' is also evaluated with each modality in SHUFFLED shuffled.

    Args:
      summary: Summary to which the success rates are added.
      problem: Problem of the run.
      learners: Learners by the names of their stages.
    """
    evaluator = problem.evaluator(
        _evaluation_key(problem), episodes=problem.config.run.eval_episodes
    )
    for split in problem.splits:
        is_train = split == problem.config.env.split
        for stage, learner in learners.items():
            if stage == "more_cloning" and not is_train:
                continue
            shuffled = SHUFFLED if stage == "final" and is_train else ()
            for modality in (None, *shuffled):
                name = f"{stage}/{split}" + (f"/shuffled_{modality}" if modality else "")
                episodes = evaluator(learner.without_optimizer(), split, modality)
                record(summary, name, describe(episodes))


def _evaluation_key(problem: Control) -> jax.Array:
    return problem_lib.stream(problem.config, problem_lib.EVALUATION)


def cloned_learner(problem: Control, workdir: epath.Path) -> LearnerState:
    """Restores the learner of behavior cloning, with its optimizer, from its last checkpoint."""
    like = jax.eval_shape(problem.stage("bc").init).learner
    parts = {"learner": mesh_lib.placed_shapes(like, partition.shardings(like, problem.mesh))}
    return checkpoint.restore_parts(workdir, parts, which="latest")[0]["learner"]


def quickstart(problem: Control, workdir: epath.Path) -> dict[str, float] | None:
    """Trains, evaluates and reports.

    Args:
      problem: Problem of the run.
      workdir: Working directory, which must be claimed for the problem, see `runs.claim`.

    Returns:
      The summary; None if a signal interrupted the run.
    """
    config, started = problem.config, time.perf_counter()
    trained = runs.train_stages(problem, workdir)
    if trained.interrupted:
        return None
    warm, tuned = trained.results["bc"], trained.results["ppo"]
    cloned = cloned_learner(problem, workdir / "bc")
    # The stage runs as long as PPO did, on the same demonstrations. It never reaches its number of
    # updates.
    stage = problem.stage(
        "bc",
        start=cloned,
        name="more_cloning",
        num_updates=100 * config.bc.num_updates,
        stream=problem_lib.COMPLETIONS,  # The batches differ from those of the warm start.
    )
    more = run_longer(stage, workdir / "more_cloning", config=config, seconds=tuned.wall_s)
    if more.interrupted:
        return None

    summary: dict[str, float] = {}
    print(f"Success over {config.run.eval_episodes} episodes, with 95 % intervals:")
    evaluate_scripted(summary, problem)
    learners = {
        "warm_start": cloned,
        "more_cloning": more.carry.learner,
        "final": tuned.carry.learner,
    }
    evaluate_stages(summary, problem, learners)
    summary |= {
        "warm_start/wall_s": warm.wall_s,
        "ppo/wall_s": tuned.wall_s,
        "more_cloning/wall_s": more.wall_s,
    } | summary_lib.totals((warm, tuned, more), started)
    summary_lib.write_json(workdir / "summary.json", summary)
    with report.tolerate_errors("Drawing success.png, or recording episodes"):
        curves = report.stage_curves(
            {
                "warm start (cloning)": [workdir / "bc"],
                "then PPO": [workdir / "bc", workdir],
                "then more cloning": [workdir / "bc", workdir / "more_cloning"],
            },
            workdir / "success.png",
            metric=f"eval/{config.env.split}/success",
        )
        outputs = [
            workdir / "summary.json",
            curves,
            # These are not the episodes of the evaluation.
            *write_episodes(
                problem,
                tuned.carry.learner,
                jax.random.fold_in(_evaluation_key(problem), 2),
                workdir,
            ),
        ]
        print("Wrote " + ", ".join(str(path) for path in outputs))
    return summary


def estimated_minutes(config: ml_collections.ConfigDict, update_s: float) -> float:
    """Returns about how many minutes a quickstart takes.

    Args:
      config: Config of the run.
      update_s: Time of a PPO update in seconds.
    """
    p, bc = config.ppo, config.bc
    samples = p.num_envs * p.unroll_length * p.num_epochs
    cloning = LEARNING * bc.num_updates * bc.batch_size / samples
    # More cloning takes as long as PPO.
    return (update_s * (cloning + 2 * p.num_updates + OTHER_UPDATES) + COMPILATION_S) / 60


def forecast(preset: str, update_s: float) -> str:
    """Returns a text that says how long a quickstart takes on this machine.

    Args:
      preset: Name of the preset.
      update_s: Time of a PPO update in seconds.
    """
    minutes = estimated_minutes(make_config(preset), update_s)
    text = (
        f"A PPO update takes {update_s:.1f} s on this machine, and the whole quickstart about "
        f"{max(minutes, 1):.0f} minutes."
    )
    if preset == "small":
        return text
    return text + smaller(
        minutes, estimated_minutes(make_config("small"), update_s), target="quickstart"
    )


def conclusion(summary: dict[str, float], workdir: str) -> str:
    """Returns a text with the results of the run and the paths of its reports."""
    stages = ("final", "warm_start", "more_cloning")
    final, warm, more = (rate(summary, f"{name}/train/success") for name in stages)
    disjoint = statistics.disjoint(final, warm) and statistics.disjoint(final, more)
    return (
        f"PPO raised the success on the training split from {warm[0]:.1%} (warm start) to "
        f"{final[0]:.1%}; more cloning for the same time gives {more[0]:.1%}. The intervals "
        f"{'do not overlap' if disjoint else 'overlap'}. {summary['wall_s'] / 60:.1f} minutes.\n"
        f"See {workdir}/episodes.mp4, {workdir}/success.png and {workdir}/learning_curves.png, or "
        f"run: tensorboard --logdir {workdir}"
    )


def main(argv: list[str]) -> int:
    """Runs the command line."""
    return run(
        argv,
        workdirs=WORKDIRS,
        make_problem=make_problem,
        forecast=lambda problem, preset: forecast(preset, update_seconds(problem.stage("ppo"))),
        quickstart=quickstart,
        conclusion=conclusion,
    )


def make_config(preset: str = "full", seed: int = 0) -> ml_collections.ConfigDict:
    """Returns the config of a preset, a key of PRESETS, with a seed."""
    return problems.complete(reach_ppo.CONFIG, PRESETS[preset], {"seed": seed})


def make_problem(seed: int, preset: str = "full") -> Control:
    """Makes the problem of a preset, a key of PRESETS, with a seed."""
    problem = problems.make(make_config(preset, seed))
    assert isinstance(problem, Control)
    return problem


if __name__ == "__main__":
    define_flags(WORKDIRS)
    run_command(main)
