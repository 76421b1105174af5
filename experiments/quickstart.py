"""The main job on its embedded default: clone, fine-tune with PPO, compare, evaluate, film.

  python -m experiments.quickstart --workdir=runs/quickstart

Writes to the workdir:
  summary.json          every number that is printed, flat, before the pictures are drawn:
                        <stage>/<split>/[no_<modality>/]success with its 95 % interval _lo, _hi, of
                        expert, chance, warm_start, more_cloning and final (PPO); times; steps
  success.png           success over time: warm start, PPO, and more cloning instead of PPO
  episodes.mp4          episodes of the final policy, their instruction as caption
  episode.png           one of them as a strip
  metrics.jsonl, tensorboard/, learning_curves.png, checkpoints/   of PPO
  warm_start/, more_cloning/                                       the same of these stages

Ctrl-C or SIGTERM saves and stops; the same command goes on where it stopped.
"""

from collections.abc import Mapping
import functools
import time

from absl import app, flags, logging
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import reach_ppo
from experiments.train import (
    FAILURES,
    clean_exit,
    draw_curves,
    prepare,
    totals,
    train,
    write_json,
)
from mmrl_jax import envs
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.envs import language_reach
from mmrl_jax.envs.brax_api import State
from mmrl_jax.evaluation import evaluate as evaluation
from mmrl_jax.evaluation import statistics
from mmrl_jax.evaluation.evaluate import Episodes, Evaluator, Modality, describe
from mmrl_jax.learners.bc import Demonstrations
from mmrl_jax.learners.learner import LearnerState, policy_function
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction
from mmrl_jax.training import checkpoint, control_models, factory, loop, report, videos
from mmrl_jax.training import workdir as workdir_lib

FLAGS = flags.FLAGS
HIDDEN: tuple[Modality, ...] = ("pixels", "instruction")  # From the final policy.
SCRIPTED = ("expert/{split}", "chance/{split}/random_object", "chance/{split}/fixed_object")


def scripted(config: ml_collections.ConfigDict, which: jax.Array) -> PolicyFunction:
    """The policy that SCRIPTED[which] names: the demonstrations' expert, or success by chance.

    Chance is a perfect controller that does not know which object is meant: it goes to one drawn
    at random, or to the first that is on the table.

    Args:
      config: of the run.
      which: int32 [], may be traced.
    """
    expert = factory.expert(config)

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


def evaluate_scripted(summary: dict[str, float], config: ml_collections.ConfigDict) -> None:
    """Success of the expert and of chance, on the training split."""
    split = config.env.split
    evaluator = Evaluator(
        lambda split: factory.make_env(config, split=split),
        functools.partial(scripted, config),
        factory.evaluation_key(config),
        episodes=config.run.eval_episodes,
        mesh=factory.make_mesh(config),
    )
    for i, name in enumerate(SCRIPTED):
        record(summary, name.format(split=split), evaluator(jnp.int32(i), split))


def evaluate_stages(
    summary: dict[str, float],
    config: ml_collections.ConfigDict,
    learners: Mapping[str, LearnerState],
) -> None:
    """Success of the stages' learners: warm_start and final on all splits, more_cloning on one.

    On the training split the final one is evaluated with modalities hidden too.
    """
    evaluator = factory.make_evaluator(
        config, factory.evaluation_key(config), episodes=config.run.eval_episodes
    )
    for split in envs.splits(config.env.name):
        trained_on = split == config.env.split
        for stage, learner in learners.items():
            if stage == "more_cloning" and not trained_on:
                continue
            hide = HIDDEN if stage == "final" and trained_on else ()
            for hidden in (None, *hide):
                name = f"{stage}/{split}" + (f"/no_{hidden}" if hidden else "")
                record(summary, name, evaluator(learner.without_optimizer(), split, hidden))


def record_video(
    config: ml_collections.ConfigDict, learner: LearnerState, workdir: epath.Path
) -> list[epath.Path]:
    """Writes the video and the strip of the final policy's episodes."""
    env = factory.make_env(config)
    apply = control_models.make_network(config, env).apply

    @jax.jit
    def run(learner: LearnerState, rng: jax.Array) -> tuple:
        policy = policy_function(apply, learner, deterministic=True)
        return evaluation.record_video(env, policy, rng, episodes=6, height=160, width=160)

    # Other episodes than the evaluation's, taken as they come.
    rng = jax.random.fold_in(factory.evaluation_key(config), 2)
    first, frames = jax.device_get(run(learner, rng))
    captions = [env.caption(jax.tree.map(lambda x, i=i: x[i], first)) for i in range(6)]
    clips = np.swapaxes(frames, 0, 1)
    video = videos.episodes_video(workdir / "episodes.mp4", clips, captions, fps=10, columns=3)
    strip = videos.episode_strip(workdir / "episode.png", clips[0], captions[0], count=5)
    return [video, strip]


def cloned_learner(
    config: ml_collections.ConfigDict, data: Demonstrations, workdir: epath.Path
) -> LearnerState:
    """The learner of the warm start as it ended, with its optimizer, from its last checkpoint."""
    mesh = factory.make_mesh(config)
    like = jax.eval_shape(factory.cloning_stage(config, mesh, data).init).learner
    parts = {"learner": mesh_lib.replicated_shapes(like, mesh=mesh)}
    return checkpoint.restore_parts(workdir, parts, which="latest")[0]["learner"]


def quickstart(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, float] | None:
    """Runs everything; returns the summary, or None if a signal interrupted it."""
    started = time.perf_counter()
    trained = train(config, workdir)
    if trained.interrupted:
        return None
    warm, tuned = trained.warm_start, trained.tuned
    cloned = cloned_learner(config, trained.demonstrations, workdir / "warm_start")
    # As long as PPO took, on the same demonstrations; the bound on updates is never reached.
    stage = factory.cloning_stage(
        config,
        factory.make_mesh(config),
        trained.demonstrations,
        name="more_cloning",
        updates=100 * config.warm_start.updates,
        start=cloned,
    )
    more = loop.run(
        stage, workdir=workdir / "more_cloning", config=config, max_seconds=tuned.wall_s
    )
    draw_curves(workdir / "more_cloning", x="progress/updates")
    if more.interrupted:
        return None

    summary: dict[str, float] = {}
    print(f"Success over {config.run.eval_episodes} episodes, with 95 % intervals:")
    evaluate_scripted(summary, config)
    learners = {
        "warm_start": cloned,
        "more_cloning": more.carry.learner,
        "final": tuned.carry.learner,
    }
    evaluate_stages(summary, config, learners)
    summary |= {
        "warm_start/wall_s": warm.wall_s,
        "ppo/wall_s": tuned.wall_s,
        "more_cloning/wall_s": more.wall_s,
    } | totals((warm, tuned, more), started)
    write_json(workdir / "summary.json", summary)
    with report.surviving("Drawing success.png, or recording episodes"):
        curves = report.stage_curves(
            {
                "warm start (cloning)": [workdir / "warm_start"],
                "then PPO": [workdir / "warm_start", workdir],
                "then more cloning": [workdir / "warm_start", workdir / "more_cloning"],
            },
            workdir / "success.png",
            metric=f"eval/{config.env.split}/success",
        )
        written = [
            workdir / "summary.json",
            curves,
            *record_video(config, tuned.carry.learner, workdir),
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
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    config = reach_ppo.get_config()
    config.seed = FLAGS.seed
    with clean_exit(ValueError):
        workdir = workdir_lib.as_path(FLAGS.workdir)
        lock = prepare(config, workdir)
    with lock, clean_exit(*FAILURES):
        summary = quickstart(config, workdir)
    if summary is None:
        print("Interrupted; the same command goes on from the last checkpoint.")
        return
    print(conclusion(summary, FLAGS.workdir))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart", "Directory that gets all outputs.")
    flags.DEFINE_integer("seed", 0, "Seed of the whole run.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
