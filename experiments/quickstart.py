"""The main job on its embedded default: clone, fine-tune with PPO, compare, evaluate, film.

  python -m experiments.quickstart --workdir=runs/quickstart

Writes to the workdir:
  summary.json          every number that is printed, flat, before the pictures are drawn:
                        <stage>/<split>/[shuffled_<modality>/]success with its 95 % interval _lo,
                        _hi, of expert, chance, warm_start, more_cloning and final (PPO); times
  success.png           success over time: warm start, PPO, and more cloning instead of PPO
  episodes.mp4          episodes of the final policy, their instruction as caption
  episode.png           one of them as a strip
  metrics.jsonl, tensorboard/, learning_curves.png, checkpoints/   of PPO
  bc/, more_cloning/            the same of the warm start and of more cloning

Ctrl-C or SIGTERM saves and stops; the same command goes on where it stopped.
"""

from collections.abc import Mapping
import functools
import time

from absl import app, flags, logging
from etils import epath
import jax
import jax.numpy as jnp

from mmrl_jax import problems, runs
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.commands.common import FAILURES, clean_exit, refuse_arguments
from mmrl_jax.configs import reach_ppo
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.envs import language_reach
from mmrl_jax.envs.brax_api import State
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.evaluate import Episodes, Evaluator, Modality, describe
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.problems import problem as problem_lib
from mmrl_jax.problems.control import Control, make_env
from mmrl_jax.reporting import report
from mmrl_jax.reporting.episodes import write_episodes
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction
from mmrl_jax.training import checkpoint, loop

FLAGS = flags.FLAGS
SHUFFLED: tuple[Modality, ...] = ("pixels", "instruction")  # Of the final policy.
SCRIPTED = ("expert/{split}", "chance/{split}/random_object", "chance/{split}/fixed_object")


def scripted(problem: Control, which: jax.Array) -> PolicyFunction:
    """The policy that SCRIPTED[which] names: the demonstrations' expert, or success by chance.

    Chance is a perfect controller that does not know which object is meant: it goes to one drawn
    at random, or to the first that is on the table.

    Args:
      problem: of the run.
      which: int32 [], may be traced.
    """
    expert = problem.expert("bc")

    def policy(state: State, rng: jax.Array) -> ActorOutput:
        active = state.info["objects"]["active"]
        # One draw an episode: the environment's own key and episode number.
        keys = jax.vmap(jax.random.fold_in)(state.info["key"], state.info["episode"] + 1)
        drawn = active * jax.vmap(lambda k: jax.random.uniform(k, active.shape[1:]))(keys)
        chosen = jnp.argmax(jnp.where(which == 1, drawn, active), axis=1)
        places = state.info["objects"]["position"][jnp.arange(chosen.shape[0]), chosen, :2]
        aimed = state.replace(info=state.info | {"privileged": {"target_place": places}})
        blind = language_reach.expert_action(aimed, rng, gain=4.0, undershoot=0.0, noise=0.0)
        decision = expert(state, rng)
        action = jnp.where(which == 0, decision.action, blind)
        return decision._replace(environment_action=action, action=action)

    return policy


def record(summary: dict[str, float], prefix: str, episodes: Episodes) -> None:
    """Adds mean and interval of episodes' success to the summary, and prints them."""
    ends = ("success", "success_lo", "success_hi")
    described = describe(episodes)
    summary |= {f"{prefix}/{end}": described[end] for end in ends}
    mean, low, high = (described[end] for end in ends)
    print(f"  {prefix:36} {mean:6.3f}  [{low:.3f}, {high:.3f}]", flush=True)


def evaluate_scripted(summary: dict[str, float], problem: Control) -> None:
    """Success of the expert and of chance, on the training split."""
    split = problem.config.env.split
    evaluator = Evaluator(
        lambda split: make_env(problem.config, split=split),
        functools.partial(scripted, problem),
        _evaluation_key(problem),
        episodes=problem.config.run.eval_episodes,
        mesh=problem.mesh,
    )
    for i, name in enumerate(SCRIPTED):
        record(summary, name.format(split=split), evaluator(jnp.int32(i), split))


def evaluate_stages(
    summary: dict[str, float],
    problem: Control,
    learners: Mapping[str, LearnerState],
) -> None:
    """Success of the stages' learners: warm_start and final on all splits, more_cloning on one.

    On the training split the final one is evaluated with modalities hidden too.
    """
    evaluator = problem.evaluator(
        _evaluation_key(problem), episodes=problem.config.run.eval_episodes
    )
    for split in problem.splits:
        trained_on = split == problem.config.env.split
        for stage, learner in learners.items():
            if stage == "more_cloning" and not trained_on:
                continue
            shuffle = SHUFFLED if stage == "final" and trained_on else ()
            for modality in (None, *shuffle):
                name = f"{stage}/{split}" + (f"/shuffled_{modality}" if modality else "")
                record(summary, name, evaluator(learner.without_optimizer(), split, modality))


def _evaluation_key(problem: Control) -> jax.Array:
    return problem_lib.stream(problem.config, problem_lib.EVALUATION)


def cloned_learner(problem: Control, workdir: epath.Path) -> LearnerState:
    """The learner of the warm start as it ended, with its optimizer, from its last checkpoint."""
    like = jax.eval_shape(problem.stage("bc").init).learner
    parts = {"learner": mesh_lib.placed_shapes(like, partition.shardings(like, problem.mesh))}
    return checkpoint.restore_parts(workdir, parts, which="latest")[0]["learner"]


def quickstart(problem: Control, workdir: epath.Path) -> dict[str, float] | None:
    """Runs everything in a directory that is claimed for it, see `runs.claim`.

    Returns:
      The summary; None if a signal interrupted it.
    """
    config, started = problem.config, time.perf_counter()
    trained = runs.train_stages(problem, workdir)
    if trained.interrupted:
        return None
    warm, tuned = trained.results["bc"], trained.results["ppo"]
    cloned = cloned_learner(problem, workdir / "bc")
    # As long as PPO took, on the same demonstrations; the bound on updates is never reached.
    stage = problem.stage(
        "bc",
        start=cloned,
        name="more_cloning",
        num_updates=100 * config.bc.num_updates,
        stream=problem_lib.COMPLETIONS,  # Other batches than those of the warm start.
    )
    more = loop.run(
        stage, workdir=workdir / "more_cloning", config=config, max_seconds=tuned.wall_s
    )
    runs.draw_curves(workdir / "more_cloning", x="progress/updates")
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
    } | runs.totals((warm, tuned, more), started)
    runs.write_json(workdir / "summary.json", summary)
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
        written = [
            workdir / "summary.json",
            curves,
            # Other episodes than the evaluation's.
            *write_episodes(
                problem,
                tuned.carry.learner,
                jax.random.fold_in(_evaluation_key(problem), 2),
                workdir,
            ),
        ]
        print("Written: " + ", ".join(str(path) for path in written))
    return summary


def conclusion(summary: dict[str, float], workdir: str) -> str:
    """What the run achieved, and where to look."""

    def success(name: str) -> tuple[float, float, float]:
        key = f"{name}/train/success"
        return summary[key], summary[f"{key}_lo"], summary[f"{key}_hi"]

    final, warm, more = success("final"), success("warm_start"), success("more_cloning")
    apart = statistics.disjoint(final, warm) and statistics.disjoint(final, more)
    return (
        f"PPO took success on the training split from {warm[0]:.1%} (warm start) to {final[0]:.1%};"
        f" as much time of more cloning gives {more[0]:.1%}. The intervals "
        f"{'do not overlap' if apart else 'overlap'}. {summary['wall_s'] / 60:.1f} minutes.\n"
        f"Look at {workdir}/episodes.mp4, {workdir}/success.png and {workdir}/learning_curves.png; "
        f"or: tensorboard --logdir {workdir}"
    )


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        workdir = workdir_lib.as_path(FLAGS.workdir)
        problem = make_problem(FLAGS.seed)
        lock = runs.claim(problem, workdir)
    with lock, clean_exit(*FAILURES):
        summary = quickstart(problem, workdir)
    if summary is None:
        print("Interrupted; the same command resumes from the last checkpoint.")
        return
    print(conclusion(summary, FLAGS.workdir))


def make_problem(seed: int) -> Control:
    """The problem of the main job."""
    config = reach_ppo.get_config()
    config.seed = seed
    problem = problems.make(config)
    assert isinstance(problem, Control)
    return problem


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart", "Directory that gets all outputs.")
    flags.DEFINE_integer("seed", 0, "Seed of the whole run.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
