r"""Records episodes of policies as a data set in the format RLDS or LeRobot.

  mmrl-make-demos --config=reach_ppo --policy=expert --episodes=2000 --output=demos/reach
  mmrl-make-demos --env=language_grid --policy=expert --episodes=500 --output=demos/grid
  mmrl-make-demos --policy=runs/reach --split=train --episodes=500 --output=demos/learned
  mmrl-make-demos --config=reach_ppo --policy=expert,weight=3 --policy=random --output=demos/mixed

The environment is that of --config, --env with its default options, or else that of the first run
in --policy. A policy is

  expert       the scripted expert: that of a stage of the config that records demonstrations, or
               else the one of the environment
  random       uniformly random actions
  <workdir>    the trained policy of a run in the same environment, without sampling

and may be followed by ',noise=<x>', Gaussian noise of this standard deviation on continuous
actions or the probability of a random discrete action, and ',weight=<w>'. With several policies,
each episode has one of them, with a probability in proportion to its weight.

Episodes are recorded in compiled rollouts, a shard at a time. The same command resumes an
interrupted recording, and demonstrations.json in the output describes it. Episodes in which a
number is not finite are set aside and counted there.
"""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from absl import flags
import jax
import ml_collections
import numpy as np

from mmrl_jax import envs, problems, restoring
from mmrl_jax.commands.common import (
    clean_exit,
    define_config,
    refuse_arguments,
    run_command,
)
from mmrl_jax.data import files, formats
from mmrl_jax.data.records import Episode, Feature, Quarantine, schema_of
from mmrl_jax.problems import control, demonstration_data, demonstrations, problem
from mmrl_jax.rollouts.record import Recorder, random_policy, with_noise
from mmrl_jax.rollouts.unroll import PolicyFunction, deterministic_output
from mmrl_jax.training.lock import NAME as LOCK
from mmrl_jax.training.lock import locked

FLAGS = flags.FLAGS
DESCRIPTION = "demonstrations.json"


class PolicySpec(NamedTuple):
    """A policy of a recording.

    Attributes:
      name: 'expert', 'random', or the working directory of a run.
      noise: Standard deviation of noise, or probability of a random discrete action.
      weight: Weight of the policy among several.
    """

    name: str
    noise: float = 0.0
    weight: float = 1.0


def parse_policy(text: str) -> PolicySpec:
    """Returns the policy of a flag, for example 'expert,noise=0.2,weight=3'.

    Raises:
      ValueError: If the text has another form, or a number is out of range.
    """
    name, *options = text.split(",")
    values: dict[str, float] = {}
    for option in options:
        key, _, value = option.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = float("nan")
    valid = values.keys() <= {"noise", "weight"} and all(x >= 0 for x in values.values())
    if not name or not valid or values.get("weight", 1.0) <= 0:
        raise ValueError(
            f"--policy={text!r}: give 'expert', 'random' or a workdir, possibly with "
            "',noise=<at least 0>' and ',weight=<above 0>'."
        )
    return PolicySpec(name, **values)


def base_config(
    config: ml_collections.ConfigDict | None,
    env: str | None,
    specs: Sequence[PolicySpec],
    *,
    trust_modules: bool,
) -> ml_collections.ConfigDict:
    """Returns the config whose environment is recorded: the given one, or else the first run's.

    Args:
      config: Config of a problem with an environment; None if none is given.
      env: Name of an environment, instead of a config; None if none is given.
      specs: Policies of the recording.
      trust_modules: Whether modules that the config of a run names may be imported.

    Raises:
      ValueError: If both or neither are given, a run cannot be read, or the config has no
        environment.
    """
    if (config is not None) and (env is not None):
        raise ValueError(f"--config and --env={env!r} are both given; give one of them.")
    if env is not None:
        return problems.complete({"problem": "control", "stages": ("ppo",), "env": {"name": env}})
    if config is None:
        workdirs = [spec.name for spec in specs if spec.name not in ("expert", "random")]
        if not workdirs:
            raise ValueError("Give --config or --env, which name the environment.")
        config = restoring.read_problem(workdirs[0], trust_modules=trust_modules)[0].config
    config = problems.complete(config)
    if "env" not in config:
        raise ValueError(f"A problem={config.problem!r} has no environment to record in.")
    return config


def make_policy(
    spec: PolicySpec, config: ml_collections.ConfigDict, env: Any, *, trust_modules: bool
) -> tuple[str, PolicyFunction]:
    """Returns a policy of a recording, with its name.

    Args:
      spec: Policy.
      config: Config whose environment is recorded.
      env: Batched environment.
      trust_modules: Whether modules that the config of a run names may be imported.

    Raises:
      ValueError: If the environment has no expert, or a run cannot be loaded or is of another
        environment.
    """
    kind, size, name = env.action_kind, env.action_size, spec.name
    if name == "random":
        policy = random_policy(kind, size)
    elif name == "expert":
        policy = _expert(config, env)
    else:
        loaded = restoring.load(name, trust_modules=trust_modules)
        other = loaded.problem.config.get("env")
        differences = _differences(other, config.env)
        if differences:
            raise ValueError(
                f"--policy={name} was trained in another environment: {differences}. Leave out "
                "--config and --env, or give a run of the same environment."
            )
        policy = loaded.policy()
        name = f"{name}@{loaded.step} ({loaded.stage})"
    if spec.noise:
        policy = with_noise(policy, spec.noise, kind, size)
        name = f"{name},noise={spec.noise:g}"
    return name, policy


def _expert(config: ml_collections.ConfigDict, env: Any) -> PolicyFunction:
    """Returns the scripted expert of a config's stage, or else that of its environment."""
    if config.env.name == "language_reach":
        for stage in config.stages:
            found = demonstration_data.demonstrated(config, stage)
            if found is not None:
                return demonstrations.expert(**found.options.expert.to_dict())
    if not hasattr(envs.unwrapped(env), "expert"):
        raise ValueError(
            f"--policy=expert: env.name={config.env.name!r} has no expert; give it a method "
            "expert(state, key) that returns actions, or record a trained policy."
        )
    return lambda state, rng: deterministic_output(env.expert(state, rng))


def _differences(one: Any, two: ml_collections.ConfigDict) -> str:
    """Returns the keys of two groups `env` that differ, except for the split, as text."""
    if one is None:
        return "it has none"
    first, second = one.to_dict(), two.to_dict()
    keys = sorted((first.keys() | second.keys()) - {"split"})
    return ", ".join(
        f"env.{key}={first.get(key)!r} there, {second.get(key)!r} here"
        for key in keys
        if first.get(key) != second.get(key)
    )


def make_demos(
    config: ml_collections.ConfigDict,
    specs: Sequence[PolicySpec],
    output: pathlib.Path,
    *,
    split: str | None,
    episodes: int,
    kind: str,
    seed: int = 0,
    shard_episodes: int = 256,
    trust_modules: bool = False,
) -> dict[str, Any]:
    """Records demonstrations, or resumes an interrupted recording.

    Args:
      config: Config of a problem with an environment.
      specs: Policies.
      output: Directory of the data set, which is created.
      split: Split of the environment; None for that of the config.
      episodes: Number of episodes.
      kind: Format, one of `formats.FORMATS`.
      seed: Seed of the episodes and of the policies.
      shard_episodes: Number of episodes of a shard, which run in parallel.
      trust_modules: Whether modules that the configs of runs name may be imported.

    Returns:
      The contents of demonstrations.json.

    Raises:
      ImportError: If a package that the format needs is not installed.
      ValueError: If an argument is invalid, or the directory has another recording.
    """
    split = split or config.env.split
    known = envs.splits(config.env.name)
    if split not in known:
        raise ValueError(f"--split={split!r} is unknown; choose one of {known}.")
    env = control.make_env(config, split=split)
    policies = dict(make_policy(spec, config, env, trust_modules=trust_modules) for spec in specs)
    if len(policies) < len(specs):
        raise ValueError(f"--policy names {list(policies)} more than once; add up the weights.")
    weights = np.array([spec.weight for spec in specs])
    recipe = {
        "env": config.env.to_dict() | {"split": split},
        "policies": dict(zip(policies, weights.tolist(), strict=True)),
        "split": split,
        "episodes": episodes,
        "seed": seed,
        "shard_episodes": shard_episodes,
        "format": kind,
    }
    recorder = Recorder(
        env,
        policies,
        jax.random.fold_in(jax.random.PRNGKey(seed), problem.DATA),
        seed=seed,
        split=split,
        history=config.env.get("history", 1),
        default_instruction=config.env.name,
    )
    dt = getattr(envs.unwrapped(env), "dt", None)
    with locked(output):
        return _record(
            recorder,
            output,
            recipe,
            weights / weights.sum(),
            fps=1.0 if dt is None else round(1 / float(dt), 3),
        )


def _record(
    recorder: Recorder,
    output: pathlib.Path,
    recipe: dict[str, Any],
    probabilities: np.ndarray,
    *,
    fps: float,
) -> dict[str, Any]:
    """Records the missing shards of a data set, and finishes it.

    Args:
      recorder: Recorder of episodes.
      output: Directory of the data set.
      recipe: Arguments of the recording.
      probabilities: Probability of each policy.
      fps: Number of steps per second.

    Returns:
      The contents of demonstrations.json.
    """
    state = _begun(output, recipe)
    if state["complete"]:
        print(f"{output} is complete already.", flush=True)
        return state
    files.remove_temporary(output)
    size, total = recipe["shard_episodes"], recipe["episodes"]
    count = -(-total // size)
    for shard in range(len(state["shards"]), count):
        # All rollouts have the same size, so that one program serves them all.
        which = np.random.default_rng([recipe["seed"], shard]).choice(
            len(probabilities), size=size, p=probabilities
        )
        numbers = range(shard * size, (shard + 1) * size)
        episodes, quarantine = recorder(numbers, which, keep=min(size, total - shard * size))
        if state["schema"] is None:
            if not episodes:
                raise ValueError(f"No episode can be recorded. {quarantine.summary()}")
            state["schema"] = schema_of(episodes[0])
        writer = _writer(output, recipe, state["schema"], count, fps)
        written = writer.write_shard(shard, episodes, [x["written"] for x in state["shards"]])
        state["shards"].append({"written": written} | _totals(episodes))
        state["quarantine"] = (Quarantine(**state["quarantine"]) + quarantine).to_json()
        _write(output, state)
        print(f"Recorded {numbers[0] + len(episodes)} of {total} episodes.", flush=True)
    writer = _writer(output, recipe, state["schema"], count, fps)
    writer.finish([x["written"] for x in state["shards"]])
    state["complete"] = True
    _write(output, state)
    return state


def _begun(output: pathlib.Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a recording, which is a new one if there is none.

    Raises:
      ValueError: If the directory has another recording, or other files.
    """
    path = output / DESCRIPTION
    if not path.exists():
        others = [x.name for x in output.iterdir() if x.name != LOCK and not x.name.startswith(".")]
        if others:
            raise ValueError(
                f"--output={output} has other files ({', '.join(sorted(others)[:3])}); give an "
                "empty directory."
            )
        quarantine = Quarantine().to_json()
        empty = {"shards": [], "schema": None, "quarantine": quarantine, "complete": False}
        return {"recipe": recipe} | empty
    try:
        state = json.loads(path.read_bytes())
        before = state["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give an empty directory.") from error
    now = json.loads(json.dumps(recipe))  # Tuples become lists, as in the file.
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        lines = "\n".join(
            f"  {key}: {before.get(key)!r} there, {now[key]!r} now" for key in changed
        )
        raise ValueError(
            f"--output={output} has another recording:\n{lines}\nGive an empty directory, or the "
            "same arguments."
        )
    if state["schema"] is not None:
        state["schema"] = {
            name: Feature(tuple(shape), dtype) for name, (shape, dtype) in state["schema"].items()
        }
    return state


def _writer(
    output: pathlib.Path,
    recipe: Mapping[str, Any],
    schema: dict[str, Feature],
    shards: int,
    fps: float,
) -> formats.EpisodeWriter:
    name = re.sub(r"\W+", "_", recipe["env"]["name"]).strip("_").lower()
    return formats.make_writer(
        recipe["format"],
        output,
        name=name,
        split=recipe["split"],
        schema=schema,
        shards=shards,
        fps=fps,
    )


def _write(output: pathlib.Path, state: dict[str, Any]) -> None:
    files.write_text(output / DESCRIPTION, json.dumps(state, indent=1) + "\n")


def _totals(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Returns sums over the episodes of a shard; 'success' is None if it is unknown."""
    origins = [episode.provenance for episode in episodes]
    success = sum(x.success for x in origins)
    return {
        "steps": sum(episode.actions for episode in episodes),
        "return": sum(x.episode_return for x in origins),
        "success": None if math.isnan(success) else success,
    }


def describe(state: Mapping[str, Any]) -> str:
    """Returns what a recording has, as text."""
    episodes = sum(x["written"]["episodes"] for x in state["shards"])
    steps, returns = (sum(x[name] for x in state["shards"]) for name in ("steps", "return"))
    success = [x["success"] for x in state["shards"]]
    parts = [f"{episodes} episodes with {steps} steps, mean return {returns / episodes:.3f}"]
    parts += [] if None in success else [f"success {sum(success) / episodes:.3f}"]
    quarantine = Quarantine(**state["quarantine"])
    return ", ".join(parts) + "." + (f" {quarantine.summary()}" if quarantine.total else "")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError, ImportError):
        specs = [parse_policy(text) for text in FLAGS.policy]
        config = base_config(FLAGS.config, FLAGS.env, specs, trust_modules=FLAGS.trust_modules)
        output = pathlib.Path(FLAGS.output).absolute()
        state = make_demos(
            config,
            specs,
            output,
            split=FLAGS.split,
            episodes=FLAGS.episodes,
            kind=FLAGS.format,
            seed=FLAGS.seed,
            shard_episodes=FLAGS.shard_episodes,
            trust_modules=FLAGS.trust_modules,
        )
    print(f"{output}: {describe(state)}")


def run() -> None:
    """Parses the flags and runs the command."""
    if define_config(__doc__):
        return
    flags.DEFINE_string("env", None, "Name of an environment, instead of a config.")
    flags.DEFINE_multi_string("policy", ["expert"], "Policy, see above; it may be repeated.")
    flags.DEFINE_string("split", None, "Split of the environment; by default that of the config.")
    flags.DEFINE_integer("episodes", 1000, "Number of episodes.", lower_bound=1)
    flags.DEFINE_string("output", None, "Directory of the data set.", required=True)
    flags.DEFINE_enum("format", "rlds", formats.FORMATS, "Format of the data set.")
    flags.DEFINE_integer("seed", 0, "Seed of the episodes and the policies.", lower_bound=0)
    flags.DEFINE_integer(
        "shard_episodes", 256, "Number of episodes of a shard, run in parallel.", lower_bound=1
    )
    flags.DEFINE_bool("trust_modules", False, "Import the modules that the configs of runs name.")
    run_command(main)


if __name__ == "__main__":
    run()
