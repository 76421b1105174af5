"""Demonstrations from a directory, which are read on the host one batch ahead.

A batch depends on the number of its update alone, and every process reads only the samples of its
own devices.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mmrl_jax.config.options import BELOW_ONE, NON_EMPTY, POSITIVE, build, option
from mmrl_jax.data import files, formats, packed
from mmrl_jax.data.images import LETTERBOX
from mmrl_jax.data.mapping import FeatureMapping, Target
from mmrl_jax.data.pipeline import Batch, Pipeline
from mmrl_jax.data.records import InvalidData
from mmrl_jax.data.weights import select
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.distributed.rows import BatchRows
from mmrl_jax.envs.brax_api import Env
from mmrl_jax.envs.instructions import Vocabulary
from mmrl_jax.learners import bc, registry
from mmrl_jax.learners.learner import LearnerState
from mmrl_jax.problems import control_models, problem
from mmrl_jax.problems.sources import Collected, Constants, Source, batches_on_host
from mmrl_jax.rl import normalization
from mmrl_jax.training.stage import Carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of the group `data` of a stage: demonstrations from a directory."""

    directory: str | None = option(
        None,
        "Directory of demonstrations as RLDS or LeRobot, see docs/demonstrations.md; None to "
        "record those of the scripted expert instead.",
        NON_EMPTY,
    )
    split: str = option("train", "Split of the demonstrations that is learned from.")
    features: dict = option(
        {},
        "Fields of the demonstrations by the names 'pixels', 'proprio', 'instruction', 'action', "
        "'reward', 'is_terminal' and 'privileged/<name>', where they differ from those that we "
        "record.",
    )
    resize: Literal["letterbox", "stretch"] = option(
        LETTERBOX,
        "How images are resized: 'letterbox' keeps the aspect ratio and pads with black, 'stretch' "
        "changes the aspect ratio.",
    )
    action_scaling: Literal["none", "min_max", "quantiles"] = option(
        "none",
        "How each dimension of the actions is scaled to [-1, 1]: by its extremes, by its quantiles "
        "0.01 and 0.99, beyond which it is clipped, or not at all.",
    )
    episodes: int | None = option(
        None, "Number of episodes from the front that are used; None for all of them.", POSITIVE
    )
    weights: str | None = option(
        None,
        "File of weights of the episodes, as `python -m experiments.audit` writes it: episodes of "
        "weight 0 are left out, and those of higher weights are sampled more often. None to sample "
        "all alike.",
        NON_EMPTY,
    )
    max_rejected: float = option(
        0.01,
        "Maximum fraction of episodes, below 1, that may be set aside because they cannot be used.",
        BELOW_ONE,
    )


class Demonstrated(NamedTuple):
    """The demonstrations that a stage learns from.

    Attributes:
      key: Name of the group of their options in the config.
      options: Values of that group, see `demonstrations.DemonstrationOptions`.
      discount: Discount factor per step of their returns.
      value_coef: Coefficient of the loss of the values that they train; 0 if they train none.
      one_step: Whether their value targets have one reward, see `bc.demonstrations`.
    """

    key: str
    options: ml_collections.ConfigDict
    discount: float
    value_coef: float
    one_step: bool


def demonstrated(config: ml_collections.ConfigDict, name: str) -> Demonstrated | None:
    """Returns the demonstrations of a stage of a control policy; None if it learns from none."""
    g = config[name]
    discount = g.get("discount", 1.0)
    if "data" in g:
        one_step = registry.CONTROL[name].experience == "one_step"
        return Demonstrated(name, g, discount, g.get("value_coef", 0.0), one_step)
    if "demonstrations" in g:
        return Demonstrated(f"{name}.demonstrations", g.demonstrations, discount, 0.0, False)
    return None


def directories(config: ml_collections.ConfigDict) -> dict[str, pathlib.Path]:
    """Returns the directories of demonstrations by the names of the stages that have one."""
    groups = {name: demonstrated(config, name) for name in config.stages}
    return {
        name: pathlib.Path(group.options.data.directory)
        for name, group in groups.items()
        if group is not None and group.options.data.directory is not None
    }


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns fingerprints of demonstrations and their weights, see `training.fingerprints`.

    Directories and files that do not exist are left out: a trained policy can be evaluated without
    its demonstrations.
    """
    parts, weights = {}, {}
    for name, path in directories(config).items():
        group = demonstrated(config, name)
        file = None if group is None else group.options.data.weights
        if path.is_dir():
            parts[name] = files.fingerprint(path)
        if file is not None and pathlib.Path(file).is_file():
            weights[name] = files.file_digest(pathlib.Path(file))
    found = {"demonstrations": parts, "weights": weights}
    return {name: files.digest(sorted(x.items())) for name, x in found.items() if x}


def target(config: ml_collections.ConfigDict, env: Env) -> Target:
    """Returns what the policy of a config observes and predicts in its environment."""
    model, observation = config.model, control_models.zeros(env)
    privileged = {name: (int(n),) for name, n in model.get("auxiliary", ())}
    if model.get("pointing") is not None:
        privileged[model.pointing] = (2,)
    encode, vocabulary = None, ""
    flat = model.kind == "mlp"  # It observes proprioception alone.
    if "instruction" in observation and not flat:
        closed = model.kind == "vlm" or model.get("text_encoder") is not None
        encode = functools.partial(_encode, env.vocabulary, closed)
        v = env.vocabulary
        vocabulary = files.digest(v.words, v.length, v.sentences if closed else ())
    return Target(
        pixels=None if flat else (config.env.height, config.env.width),
        proprio=observation["proprio"].shape[-1],
        action_size=env.action_size,
        discrete=env.action_kind == "discrete",
        encode=encode,
        vocabulary=vocabulary,
        privileged=privileged,
    )


def _encode(vocabulary: Vocabulary, closed: bool, text: str) -> np.ndarray:
    """Returns the tokens of an instruction.

    Args:
      vocabulary: Vocabulary of the environment.
      closed: Whether the model knows only the sentences of the vocabulary.
      text: Instruction.

    Raises:
      ValueError: If the policy cannot read the instruction.
    """
    tokens = vocabulary.encode(text)
    if closed and vocabulary.decode(tokens) not in vocabulary.sentences:
        raise ValueError(
            f"{text!r} is none of the {len(vocabulary.sentences)} instructions of the environment, "
            "which alone the encoder of the model has read."
        )
    return tokens


def open_pipeline(
    group: DataOptions,
    into: Target,
    *,
    batch_size: int,
    seed: int,
    history: int,
    discount: float,
    value_coef: float,
    one_step: bool,
    name: str,
) -> Pipeline:
    """Opens a directory of demonstrations, reads it once into the cache, and prints what it has.

    Args:
      group: Options of the demonstrations.
      into: Inputs and targets of the policy.
      batch_size: Number of samples in an update.
      seed: Seed of the order of the samples.
      history: Number of frames of an observation.
      discount: Discount factor per step of the returns.
      value_coef: Coefficient of the value loss; 0 if no critic is trained.
      one_step: Whether value targets have one reward.
      name: Name of the group of options that has `data`, for messages.

    Raises:
      ImportError: If a package that the format needs is not installed.
      InvalidData: If the demonstrations cannot be used; the message has the reason and the remedy.
    """
    assert group.directory is not None
    key, directory = f"{name}.data", pathlib.Path(group.directory)
    try:
        source = formats.open_directory(directory, group.split)
        mapping = FeatureMapping(
            source, group.features, into, resize=group.resize, key=f"{key}.features"
        )
        digest = files.digest(files.fingerprint(directory), group.split)
        data = packed.pack(
            source,
            mapping,
            episodes=group.episodes,
            fingerprint=digest,
            cache=files.cache_directory() / "demonstrations",
        )
    except InvalidData as error:
        raise InvalidData(f"{key}.directory={group.directory!r}: {error}") from error
    set_aside, episodes = data.quarantine, len(data.numbers)
    if set_aside.total > group.max_rejected * (set_aside.total + episodes):
        raise InvalidData(
            f"{key}.directory={group.directory!r}: {set_aside.summary()}\nThat is more than the "
            f"fraction {key}.max_rejected={group.max_rejected}; fix them, or raise it."
        )
    if value_coef > 0 and not data.has_reward:
        raise InvalidData(
            f"{key}.directory={group.directory!r} has no rewards, but {name}.value_coef="
            f"{value_coef} trains a critic on them; name the field of the rewards in "
            f"{key}.features, or clone without a critic, by the stage 'bc' with bc.value_coef=0."
        )
    weights = None
    if group.weights is not None:
        ids = [source.name(int(number)) for number in data.numbers]
        weights = select(group.weights, ids, [digest] * len(ids), key=f"{key}.weights")
    tokens = None if into.encode is None else np.stack([into.encode(x) for x in data.texts])
    pipeline = Pipeline(
        data,
        tokens=tokens,
        batch_size=batch_size,
        seed=seed,
        history=history,
        discount=discount,
        one_step=one_step,
        scaling=group.action_scaling,
        key=f"{key}.action_scaling",
        weights=weights,
    )
    lines = [f"{directory}, split {group.split!r}: {episodes} episodes, {len(pipeline)} steps."]
    lines += [set_aside.summary()] if set_aside.total else []
    if weights is not None:
        lines.append(f"{(weights == 0).sum()} episodes have the weight 0 in {group.weights}.")
    if group.action_scaling != "none":
        lines.append(f"Actions are scaled by the statistics in {data.directory / packed.INDEX}.")
    if jax.process_index() == 0:
        print("\n".join(lines), flush=True)
    return pipeline


def to_batch(batch: Batch) -> bc.Batch:
    """Returns a batch in the form that algorithms learn from."""
    samples: Mapping[str, Any] = {
        "observation": batch.observation,
        "action": batch.action,
        "value_return": batch.value_return,
        "bootstrap": np.zeros(len(batch.rows), np.int32),  # The observations are gathered already.
        "bootstrap_weight": batch.bootstrap_weight,
        "privileged": batch.privileged,
    }
    return bc.Batch(bc.Demonstrations(**samples), batch.next_observation)


def source(pipeline: Pipeline, *, num_updates: int, mesh: Mesh) -> Source:
    """Returns a source of the batches of a pipeline, split over the devices.

    Args:
      pipeline: Pipeline of demonstrations.
      num_updates: Number of updates of the stage.
      mesh: Device mesh.
    """
    size = pipeline.batch_size
    rows = BatchRows(mesh, size)

    def read(update: int) -> bc.Batch:
        return rows.put(to_batch(pipeline.batch(update, rows.held)))

    def prepare(learner: LearnerState) -> LearnerState:
        arrays = pipeline.packed.arrays
        proprio = jnp.asarray(arrays["proprio"][pipeline.sampled])
        mask = jnp.ones(proprio.shape[:-1])
        return learner.replace(normalizer=normalization.update(learner.normalizer, proprio, mask))

    return Source(
        stream=problem.FIXED_SET,
        samples_per_update=size,
        on_host=batches_on_host(read, num_updates=num_updates, mesh=mesh),
        prepare=prepare,
    )


def stage_source(config: ml_collections.ConfigDict, name: str, env: Env, mesh: Mesh) -> Source:
    """Returns the source of a stage whose demonstrations are in a directory.

    Args:
      config: Config of the run.
      name: Name of the stage.
      env: Batched environment.
      mesh: Device mesh.

    Raises:
      InvalidData: If the demonstrations cannot be used, in all processes.
    """
    stage, into = demonstrated(config, name), target(config, env)
    assert stage is not None
    batch_size = stage.options.batch_size
    if mesh_lib.only_described():
        return described_source(env, into, batch_size=batch_size)
    opened = functools.partial(
        open_pipeline,
        build(DataOptions, stage.options.data),
        into,
        batch_size=batch_size,
        seed=config.seed,
        history=config.env.history,
        discount=stage.discount,
        value_coef=stage.value_coef,
        one_step=stage.one_step,
        name=stage.key,
    )
    return source(multihost.on_all(opened), num_updates=config[name].num_updates, mesh=mesh)


def described_source(env: Env, wanted: Target, *, batch_size: int) -> Source:
    """Returns a source of the shapes of a batch, for devices that are only described.

    Args:
      env: Batched environment.
      wanted: What the policy observes and predicts, see `target`.
      batch_size: Number of samples in an update.
    """

    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *sizes), dtype)

    observation = jax.tree.map(
        lambda x: shape(*x.shape[1:], dtype=x.dtype), control_models.zeros(env)
    )
    samples = bc.Demonstrations(
        observation=observation,
        action=shape(dtype=jnp.int32) if wanted.discrete else shape(wanted.action_size),
        value_return=shape(),
        bootstrap=shape(dtype=jnp.int32),
        bootstrap_weight=shape(),
        privileged={name: shape(*sizes) for name, sizes in wanted.privileged.items()},
    )

    def collect(carry: Carry, constants: Constants) -> Collected:
        return Collected(None, constants.data, carry.rng, {})

    return Source(
        stream=problem.FIXED_SET,
        samples_per_update=batch_size,
        data=bc.Batch(samples, observation),
        collect=collect,
    )
