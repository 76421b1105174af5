"""Builds a run on questions from a folder, with a user's own reward functions; see `SCHEMA`.

    records of the update -> [answers] -> texts -> reward functions -> [learning] -> next update

In brackets are the two compiled programs of an update; what lies between happens on the host. The
records' own answers can be learned from first.
"""

from collections.abc import Callable
import functools
import importlib
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.chunks import in_chunks
from mmrl_jax.evaluation.questions import Sample
from mmrl_jax.evaluation.statistics import bootstrap_interval
from mmrl_jax.learners import grpo
from mmrl_jax.learners.grpo import ScoredCompletions
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.pretrained.chat import ChatTokenizer
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks import images as images_lib
from mmrl_jax.tasks.folder import METADATA, Batch
from mmrl_jax.tasks.question import Prompt, Texts
from mmrl_jax.tasks.rewards import RewardFunction, Rewards, RewardWorkerPool
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import fingerprints, question_factory, token_models, token_stages
from mmrl_jax.training.config import Field, between, non_negative, one_of, positive, texts
from mmrl_jax.training.factory import make_mesh
from mmrl_jax.training.host_rewards import (
    Scored,
    Scorer,
    Split,
    answer_rows,
    open_split,
    prompt_rows,
    tell_images,
    tell_rejected,
)
from mmrl_jax.training.prefetch import Prefetch
from mmrl_jax.training.stage import Carry, HostUpdate, Stage
from mmrl_jax.training.token_models import TokenModel
from mmrl_jax.types import Metrics, Params

ALGORITHMS = ("sft", "grpo", "dpo", "token_ppo")
VALIDATION, TEST = SPLITS = ("validation", "test")
BEST = f"eval/{VALIDATION}/return"

_RUN = question_factory.SCHEMA["run"]
assert not isinstance(_RUN, Field)  # A group of them.

SCHEMA: config_lib.Schema = {
    "seed": question_factory.SCHEMA["seed"],
    "algorithm": one_of(
        ALGORITHMS,
        "'sft' is supervised fine-tuning alone, 'grpo' its whole family, 'dpo' prefers the best of "
        "its answers to the worst; RL fine-tunes first if sft.updates is above 0",
    ),
    "devices": question_factory.SCHEMA["devices"],
    "folder": {
        "directory": Field(
            str, lambda x: x != "", "given", "with metadata.jsonl, see mmrl_jax/tasks/folder.py"
        ),
        "height": positive(int, "of the images that the model is given, pixels"),
        "width": positive(int, "of the images that the model is given, pixels"),
        "resize": one_of(
            images_lib.RESIZES,
            "how images come to that size: 'letterbox' keeps the aspect ratio and pads with black, "
            "'stretch' does not keep it",
        ),
        "prompt_tokens": positive(
            int, "most tokens of a question with its picture; records of longer ones are rejected"
        ),
        "answer_tokens": positive(
            int,
            "most tokens of an answer, where it is cut off; with sft.updates above 0, records of "
            "longer ones are rejected",
        ),
        "max_rejected": between(float, 0, 1, "share of records, below 1, that may be of no use"),
        "validation_size": positive(
            int,
            "least number of records that are evaluated while training and choose the best "
            "checkpoint; records of one image stay together",
        ),
        "test_size": non_negative(
            int, "least number of records that are reported; 0 with folder.test_directory"
        ),
        "test_directory": Field(
            (str, type(None)),
            lambda x: x != "",
            "given, or None",
            "a folder whose records are reported; none of its images may be in folder.directory",
        ),
        "split_seed": non_negative(
            int, "of the choice of validation and test images; independent of seed"
        ),
    },
    "rewards": {
        "functions": texts("'module:function' each, see mmrl_jax/tasks/rewards.py"),
        "weights": Field(
            tuple,
            lambda x: all(type(w) in (int, float) and math.isfinite(w) for w in x),
            "finite numbers alone",
            "of the functions' results, whose sum is the reward",
        ),
        "workers": positive(int, "processes that call the functions"),
        "timeout_s": positive(float, "seconds for one call"),
        "memory_mb": Field(
            (int, type(None)),
            lambda x: x > 0,
            "greater than 0, or None",
            "limit in MiB on the address space of each process that calls the functions or is "
            "started by them; None: no limit",
        ),
        "max_failed": Field(
            float,
            lambda x: 0 <= x < 1,
            "at least 0 and below 1",
            "share of the answers of an evaluation that may be without a reward; above it the "
            "return is not reported and chooses no checkpoint",
        ),
    },
    "model": token_models.MODEL,
    # On the records' answers.
    "sft": token_stages.SFT,
    "rl": {
        "questions": positive(int, "learned from in an update"),
        "group": positive(int, "answers to each question"),
        "pack_rows": question_factory.PACK_ROWS,
    }
    # An answer in free text has a meaning, or not, for the reward functions alone.
    | {name: field for name, field in token_stages.RL.items() if name != "penalty"}
    | dict(token_stages.TRUNCATION),
    "grpo": question_factory.SCHEMA["grpo"],
    "dpo": question_factory.SCHEMA["dpo"],
    "ppo": question_factory.SCHEMA["ppo"],
    # What is evaluated is folder.validation_size.
    "run": {name: field for name, field in _RUN.items() if name != "eval_episodes"},
}


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is compiled; reads the whole folder.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    config_lib.check_config(config, SCHEMA)
    # Each process would score all answers, and one whose rewards fail keep the others waiting.
    if jax.process_count() > 1:
        raise ValueError(
            f"folder.directory={config.folder.directory!r} on {jax.process_count()} processes: "
            "runs with reward functions are for one process, which may have several devices."
        )
    if config.model.pretrained is None:
        raise ValueError(
            "model.pretrained=None, but a folder's texts are free, and no decoder from scratch can "
            "read them: give 'smollm2', or a directory of a model that was trained to chat."
        )
    token_models.check_model(config, config.folder.height, config.folder.width, "folder")
    question_factory.check_groups(config)
    token_stages.check_reference(config)
    token_models.check_sizes(
        config,
        {
            "sft.batch_size": config.sft.batch_size,
            "rl.questions": config.rl.questions,
            **question_factory.learned_together(config),
        },
    )
    if config.algorithm == "sft" and not config.sft.updates:
        raise ValueError("sft.updates=0, but algorithm='sft' is nothing else; raise it.")
    f = config.folder
    if (f.test_directory is None) == (f.test_size == 0):
        raise ValueError(
            f"folder.test_size={f.test_size}, folder.test_directory={f.test_directory!r}: what is "
            "reported is either so many records of folder.directory or all of another folder; "
            "give a size above 0 and None, or 0 and a folder."
        )
    reward_functions(config)
    parts = make_parts(config)
    token_models.check_trainable(config, parts.model)
    token_stages.check_overlong(config, config.folder.answer_tokens)
    open_records(config, parts)


class Parts(NamedTuple):
    """What the stages of a run share.

    Attributes:
      chat: the model's texts.
      images: image tokens of a picture.
      model: answers.
    """

    chat: ChatTokenizer
    images: int
    model: TokenModel

    @property
    def policy(self) -> TokenPolicy:
        """Of the model."""
        return self.model.policy


def make_parts(config: ml_collections.ConfigDict) -> Parts:
    """The model of a config, and its texts.

    Raises:
      ValueError: see `token_models.pretrained`; or folder.prompt_tokens do not hold a picture.
    """
    f, size = config.folder, (config.folder.height, config.folder.width)
    source = token_models.pretrained(config.model, size)
    assert source is not None  # See `check`.
    images = token_models.image_tokens(config.model, source, size)
    tokens, present = prompt_rows(source.chat, [""], length=f.prompt_tokens, images=images)
    # No question and no answer is known beforehand: this is what the shapes are read from.
    texts = Texts(("",), (), tokens, present, np.zeros((0, f.answer_tokens), np.int32), source.chat)
    return Parts(source.chat, images, token_models.make_model(config.model, source, texts, size))


def open_records(config: ml_collections.ConfigDict, parts: Parts) -> Split:
    """Opens the folder of a config; again, only if its table or what is asked of it has changed.

    Raises:
      ValueError: see `open_split`.
    """
    f = config.folder
    directory = pathlib.Path(f.directory).resolve()
    tested = None if f.test_directory is None else pathlib.Path(f.test_directory).resolve()
    tables = [place / METADATA for place in (directory, tested) if place is not None]
    return open_split(
        tuple((x.stat().st_mtime_ns, x.stat().st_size) if x.is_file() else None for x in tables),
        parts.chat,
        directory=directory,
        test_directory=tested,
        validation_size=f.validation_size,
        test_size=f.test_size,
        split_seed=f.split_seed,
        size=(f.height, f.width),
        resize=f.resize,
        batch_size=config.rl.questions,
        seed=config.seed,
        max_rejected=f.max_rejected,
        answer_length=f.answer_tokens if config.sft.updates else None,
        length=f.prompt_tokens,
        images=parts.images,
    )


def tell_records(config: ml_collections.ConfigDict, records: Split) -> None:
    """Prints which records of a folder are left out, and what is done to the images."""
    f = config.folder
    tell_rejected(records)
    tell_images(records, (f.height, f.width), resize=f.resize)


def make_scorer(config: ml_collections.ConfigDict, chat: ChatTokenizer) -> Scorer:
    """Scores answers by the functions of a config.

    Raises:
      ValueError: one cannot be imported, one is named twice, or there are not as many weights.
      RuntimeError: see `RewardWorkerPool`.
    """
    r, functions = config.rewards, reward_functions(config)
    weights = dict(zip(functions, r.weights, strict=True))
    pool = RewardWorkerPool(
        functions,
        weights,
        workers=r.workers,
        timeout_s=r.timeout_s,
        memory_mb=r.memory_mb,
    )
    return Scorer(pool, chat)


def reward_functions(config: ml_collections.ConfigDict) -> dict[str, RewardFunction]:
    """The functions of rewards.functions by their names there; for errors see `make_scorer`."""
    names, weights = tuple(config.rewards.functions), tuple(config.rewards.weights)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards.functions={names} must name one function or more, each once.")
    if len(weights) != len(names):
        raise ValueError(
            f"rewards.weights={weights} must be as many numbers as rewards.functions={names}."
        )
    functions = {}
    for name in names:
        module, _, function = str(name).partition(":")
        try:
            functions[name] = getattr(importlib.import_module(module), function)
        except Exception as error:  # Importing executes the user's module.
            raise ValueError(
                f"rewards.functions has {name!r}, which cannot be imported "
                f"({config_lib.describe_failure(error)}); write 'module:function', of a module "
                "that is installed or in the current directory."
            ) from error
    return functions


def dependencies(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Fingerprints of what a run depends on beside its config, see `fingerprints`."""
    parts = make_parts(config)
    records = open_records(config, parts)
    directories = config.folder.directory, config.folder.test_directory
    tables = [(pathlib.Path(d) / METADATA).read_bytes() for d in directories if d is not None]
    images = [
        (name, info.digest)
        for part in records
        for name, info in zip(part.names, part.images, strict=True)
    ]
    sources = {name: _source(name) for name in reward_functions(config)}
    return token_models.dependencies(config.model, parts.chat) | {
        "records": fingerprints.digest(tables, sorted(images)),
        "reward_functions": fingerprints.digest(sorted(sources.items())),
    }


def _source(name: str) -> bytes:
    """The file of the module that a reward function is named by, 'module:function'.

    Not that of the function itself, which may be of a decorator in another module, or an object.

    Raises:
      ValueError: the module has no file.
    """
    file = importlib.import_module(name.partition(":")[0]).__file__
    if file is None:
        raise ValueError(
            f"rewards.functions has {name!r}, whose module is a directory without __init__.py; "
            "name the module in it that defines the function."
        )
    return pathlib.Path(file).read_bytes()


def make_ask(
    config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh
) -> Callable[[Batch], Prompt]:
    """A function that splits the B questions of a batch over the devices of a mesh."""
    length, images = config.folder.prompt_tokens, parts.images

    def ask(batch: Batch) -> Prompt:
        tokens, present = prompt_rows(parts.chat, batch.prompts, length=length, images=images)
        unnamed = np.zeros(len(tokens), np.int32)  # Of no table of a task's texts.
        arrays = tokens, present, batch.images, *(unnamed,) * 4
        return Prompt(*mesh_lib.put_batch(arrays, mesh=mesh))

    return ask


def sft_stage(config: ml_collections.ConfigDict, mesh: Mesh) -> Stage:
    """Supervised fine-tuning on the answers of the records.

    Raises:
      ValueError: see `open_records`.
      RuntimeError: see `RewardWorkerPool`.
    """
    parts = make_parts(config)
    records = open_records(config, parts)
    tell_records(config, records)
    ask, scorer = make_ask(config, parts, mesh), make_scorer(config, parts.chat)
    train = records.train.batched(config.sft.batch_size)
    scorer.rehearse(train)
    measure = _make_measure(config, _make_greedy(config, parts, mesh, records, ask, scorer))

    def labels(update: int) -> token_stages.Labels:
        batch = train.batch(update)
        rows = answer_rows(parts.chat, batch.answers, length=config.folder.answer_tokens)
        return ask(batch), *mesh_lib.put_batch(rows, mesh=mesh)

    return token_stages.sft_stage(
        config,
        mesh,
        parts.model,
        labels,
        evaluation=lambda frozen: token_stages.evaluation(measure, frozen, VALIDATION),
        best_metric=BEST,
    )


def rl_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, *, start: Params | None = None
) -> Stage:
    """RL on what the reward functions return, from the pretrained model or a fine-tuned one.

    Raises:
      ValueError: see `open_records`.
      RuntimeError: see `RewardWorkerPool`.
    """
    r, parts = config.rl, make_parts(config)
    records, replicated = open_records(config, parts), mesh_lib.replicated(mesh)
    learning = token_stages.make_learning(config, mesh, parts.model, start)
    ask, scorer = make_ask(config, parts, mesh), make_scorer(config, parts.chat)
    scorer.rehearse(records.train)
    if not config.sft.updates:
        tell_records(config, records)

    def keys(rng: jax.Array, updates: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(rng, updates))

    @functools.partial(jax.jit, out_shardings=replicated)
    def generate(
        params: Params, frozen: Any, asked: Prompt, rng: jax.Array, updates: jax.Array
    ) -> Completions:
        asked = mesh_lib.constrain_batch(asked, mesh=mesh)  # Each device answers its part.
        sampling = Sampling(temperature=r.temperature)
        key = keys(rng, updates)[0]
        return parts.policy.answer(params, frozen, asked, key, group=r.group, sampling=sampling)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def step(
        carry: Carry, frozen: Any, experience: ScoredCompletions, failed: jax.Array
    ) -> tuple[Carry, Metrics]:
        key = keys(carry.rng, carry.updates)[1]
        experience = token_stages.shape_rewards(config, experience)
        carry, metrics = learning.step(carry, frozen, experience, key)
        lost = {"completion/unscored": 1 - jnp.mean(experience.scored), "reward/failed": failed}
        return carry, metrics | grpo.describe(experience) | lost

    placed = functools.partial(mesh_lib.replicated_shapes, mesh=mesh)

    def read(update: int) -> tuple[Batch, Prompt]:
        batch = records.train.batch(update)
        return batch, ask(batch)

    def on_host(carry: Carry, frozen: Any) -> HostUpdate:
        _, asked = read(0)
        generating = generate.lower(carry.learner.params, frozen, asked, carry.rng, carry.updates)
        number = placed(np.empty((r.questions, r.group), np.float32))
        learned_from = ScoredCompletions(asked, placed(generating.out_info), number, number)
        stepping = step.lower(carry, frozen, learned_from, placed(np.float32(0)))
        generated, stepped = generating.compile(), stepping.compile()
        batches = Prefetch(read, updates=config.run.updates)

        def collect(carry: Carry, frozen: Any) -> tuple[ScoredCompletions, jax.Array]:
            batch, asked = batches(int(jax.device_get(carry.updates)))
            answers = generated(carry.learner.params, frozen, asked, carry.rng, carry.updates)
            _, rewards = scorer(records.train, batch, answers)
            # NaN times a mask of 0 is NaN.
            numbers = np.where(rewards.valid, rewards.reward, 0), rewards.valid.astype(np.float32)
            reward, scored, failed = jax.device_put(
                (*numbers, np.float32(rewards.failed)), replicated
            )
            return ScoredCompletions(asked, answers, reward, scored), failed

        return HostUpdate(
            collect,
            lambda carry, frozen, collected: stepped(carry, frozen, *collected),
            placed(stepping.out_info[1]),
        )

    measure = _make_measure(config, _make_greedy(config, parts, mesh, records, ask, scorer))

    return token_stages.make_stage(
        config,
        mesh,
        learning,
        update=None,
        on_host=on_host,
        samples_per_update=r.questions * r.group,
        evaluate=token_stages.evaluation(measure, learning.frozen, VALIDATION),
        best_metric=BEST,
        console=("completion/reward", "completion/unscored", BEST, "time/samples_per_s"),
    )


def split_sizes(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Numbers of records of what can be evaluated on."""
    records = open_records(config, make_parts(config))
    return {split: len(getattr(records, split)) for split in SPLITS}


def splits(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """What can be evaluated on: records that are not learned from."""
    return SPLITS


def make_measure(
    config: ml_collections.ConfigDict, *, episodes: int | None
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    """The reported evaluation: (trained and frozen half, split) -> see `described`.

    The function raises ValueError if a split has fewer records.

    Args:
      config: of the run.
      episodes: the first so many records of a split; None for all.
    """
    return _make_measure(config, _greedy_of(config, episodes))


def answered_samples(
    config: ml_collections.ConfigDict, variables: tuple[Params, Any], count: int
) -> list[Sample]:
    """The first records of the test split, with the greedy answers of a policy.

    Args:
      config: of the run.
      variables: trained and frozen half.
      count: the most that are returned.
    """
    return _samples(*_greedy_of(config)(variables, TEST), count)


def tested_samples(
    config: ml_collections.ConfigDict, variables: tuple[Params, Any], count: int
) -> tuple[list[Sample], dict[str, float]]:
    """`answered_samples`, and the metrics of the whole test split by their logged names."""
    answered = _greedy_of(config)(variables, TEST)
    found = described(answered[1].rewards, TEST, max_failed=config.rewards.max_failed)
    tested = {f"eval/{TEST}/{name}": value for name, value in found.items()}
    return _samples(*answered, count), tested


def _samples(batch: Batch, scored: Scored, count: int) -> list[Sample]:
    completions, rewards = scored
    return [
        Sample(
            batch.images[i],
            batch.prompts[i],
            batch.answers[i],
            text,
            float(rewards.reward[i, 0]),
            correct=None,  # What is right, the reward functions alone can say.
        )
        for i, (text,) in enumerate(completions[:count])
    ]


Greedy = Callable[[tuple[Params, Any], str], tuple[Batch, Scored]]


def _greedy_of(config: ml_collections.ConfigDict, episodes: int | None = None) -> Greedy:
    """`_make_greedy` of a config alone."""
    parts, mesh = make_parts(config), make_mesh(config)
    return _make_greedy(
        config,
        parts,
        mesh,
        open_records(config, parts),
        make_ask(config, parts, mesh),
        make_scorer(config, parts.chat),
        episodes,
    )


def _make_greedy(
    config: ml_collections.ConfigDict,
    parts: Parts,
    mesh: Mesh,
    records: Split,
    ask: Callable[[Batch], Prompt],
    scorer: Scorer,
    episodes: int | None = None,
) -> Greedy:
    """(both halves, split) -> its first records, or all, and the greedy answers to them, G = 1."""
    most = token_stages.evaluated_together(config)

    @functools.cache  # An evaluation is repeated, and images are read from files.
    def read(split: str) -> Batch:
        part = getattr(records, split)
        count = len(part) if episodes is None else episodes
        if count > len(part):
            raise ValueError(
                f"{count} episodes, but split {split!r} has {len(part)} records; ask for as many "
                "at most."
            )
        return part.read(range(count))

    @jax.jit
    def answer(variables: tuple[Params, Any], asked: Prompt) -> Completions:
        greedy = Sampling(temperature=0.0)
        return parts.policy.answer(*variables, asked, jax.random.key(0), group=1, sampling=greedy)

    def greedy(variables: tuple[Params, Any], split: str) -> tuple[Batch, Scored]:
        batch, part = read(split), getattr(records, split)
        answers = in_chunks(
            lambda places: answer(variables, ask(batch.take(places))),
            np.arange(len(batch.records)),
            most=most,
            devices=mesh.size,
        )
        return batch, scorer(part, batch, answers, allow_none=True)

    return greedy


def _make_measure(
    config: ml_collections.ConfigDict, greedy: Greedy
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    """(both halves, split) -> see `described`."""

    def measure(variables: tuple[Params, Any], split: str) -> dict[str, float]:
        _, (_, rewards) = greedy(variables, split)
        return described(rewards, split, max_failed=config.rewards.max_failed)

    return measure


def described(rewards: Rewards, split: str, *, max_failed: float) -> dict[str, float]:
    """Metrics of the answers to the records of a split, one answer each.

    A mean over those answers alone whose reward functions did not fail is a mean of those that are
    well-formed, where malformed ones are what functions fail on. It is therefore reported next to
    the share that failed, and not at all (NaN, which is no best value either) above `max_failed`.

    Args:
      rewards: of the answers, [B, 1].
      split: its name, for the message.
      max_failed: the share of answers, in [0, 1), that may be without a reward.

    Returns:
      'failed_fraction', the share of answers without a reward; 'return', their mean reward, and
      'return_lo' and 'return_hi', its 95 % interval; and for each function 'reward/<function>', the
      mean of its results, NaN if more than `max_failed` of them are missing.
    """
    failed = float(np.mean(~rewards.valid))
    interval = math.nan, math.nan, math.nan
    if failed <= max_failed:
        scored = rewards.reward[rewards.valid]
        interval = bootstrap_interval(scored, confidence=0.95, resamples=2000, seed=0)
    else:
        print(
            f"{failed:.0%} of the answers to split {split!r} have no reward, more than "
            f"rewards.max_failed={max_failed}: the return is not reported, for it would be that of "
            "the other answers. Let the reward functions return a number for every answer, or "
            "declare what a failed call counts as, see mmrl_jax/tasks/rewards.py.",
            file=sys.stderr,
            flush=True,
        )

    def mean(part: np.ndarray) -> float:
        there = np.isfinite(part)
        return float(part[there].mean()) if np.mean(~there) <= max_failed else math.nan

    parts = {f"reward/{name}": mean(part) for name, part in rewards.parts.items()}
    names = ("return", "return_lo", "return_hi")
    return dict(zip(names, interval, strict=True)) | {"failed_fraction": failed} | parts
