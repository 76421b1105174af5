"""Writes episodes of a trained policy as a video and as a strip of frames."""

from typing import Any

from etils import epath
import jax
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.evaluation import evaluate
from mmrl_jax.problems import Problem
from mmrl_jax.reporting import videos


def write_episodes(
    problem: Problem,
    variables: Any,
    rng: jax.Array,
    directory: epath.Path,
    *,
    episodes: int = 6,
    size: int = 160,
) -> list[epath.Path]:
    """Writes episodes.mp4 with the instructions as captions, and episode.png, a strip of frames.

    Args:
      problem: Problem whose environment can be rendered. Episodes are of its training split.
      variables: Variables of the policy.
      rng: PRNG key of the episodes. All sampled episodes are shown, without selection.
      directory: Directory in which the files are written.
      episodes: Number of episodes in the video.
      size: Height and width of the frames in pixels.

    Returns:
      Paths of the two files, which process 0 writes; empty in other processes.

    Raises:
      ValueError: If the problem has no environment, or its environment has no scene to render.
    """
    env = getattr(problem, "env", None)
    if env is None or not hasattr(env, "caption"):
        raise ValueError(
            f"A run of problem={problem.config.problem!r} on {problem.config.get('env', {})!s} has "
            "no episodes with an instruction that could be rendered."
        )

    @jax.jit
    def run(variables: Any, rng: jax.Array) -> tuple:
        policy = problem.policy(variables)
        return evaluate.record_video(env, policy, rng, episodes=episodes, height=size, width=size)

    first, frames = mesh_lib.get(run(variables, rng))
    if not multihost.is_primary():
        return []
    captions = [env.caption(jax.tree.map(lambda x, i=i: x[i], first)) for i in range(episodes)]
    clips = np.swapaxes(frames, 0, 1)
    video = videos.episodes_video(
        directory / "episodes.mp4", clips, captions, fps=10, columns=min(3, episodes)
    )
    strip = videos.episode_strip(directory / "episode.png", clips[0], captions[0], count=5)
    return [video, strip]
