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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.questions import Sample
from mmrl_jax.evaluation.statistics import bootstrap_interval
from mmrl_jax.learners import grpo
from mmrl_jax.learners.grpo import Experience
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.pretrained.chat import Chat
from mmrl_jax.rollouts.generate import Generated, Sampling
from mmrl_jax.tasks import images as images_lib
from mmrl_jax.tasks.folder import METADATA, Batch, Records
from mmrl_jax.tasks.question import Question, Texts
from mmrl_jax.tasks.rewards import Pool, RewardFunction
from mmrl_jax.training import config as config_lib
from mmrl_jax.training import question_factory, token_models, token_stages
from mmrl_jax.training.config import Field, between, one_of, positive, texts
from mmrl_jax.training.factory import make_mesh
from mmrl_jax.training.folder_data import (
    Scored,
    Scorer,
    Split,
    answer_rows,
    open_split,
    prompt_rows,
    tell_images,
    tell_rejected,
)
from mmrl_jax.training.loop import Carry, HostUpdate, Stage
from mmrl_jax.training.token_models import TokenModel
from mmrl_jax.types import Metrics, Params

ALGORITHMS = ("sft", "grpo", "dpo", "token_ppo")
SPLIT = "heldout"
BEST = f"eval/{SPLIT}/return"

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
    },
    "model": token_models.MODEL,
    # On the records' answers; the pictures of all of them lie in the device's memory then.
    "sft": token_stages.SFT,
    "rl": {
        "questions": positive(int, "learned from in an update"),
        "group": positive(int, "answers to each question"),
        "pack_rows": question_factory.PACK_ROWS,
    }
    # An answer in free text has a meaning, or not, for the reward functions alone.
    | {name: field for name, field in token_stages.RL.items() if name != "penalty"},
    "grpo": question_factory.SCHEMA["grpo"],
    "dpo": question_factory.SCHEMA["dpo"],
    "ppo": question_factory.SCHEMA["ppo"],
    "run": question_factory.SCHEMA["run"],
}


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that cannot run, before anything is compiled; reads the whole folder.

    Raises:
      ValueError: names the field, its value and the remedy.
    """
    config_lib.check_config(config, SCHEMA)
    if config.model.pretrained is None:
        raise ValueError(
            "model.pretrained=None, but a folder's texts are free, and no decoder from scratch can "
            "read them: give 'smollm2', or a directory of a model that was trained to chat."
        )
    token_models.check_model(config, config.folder.height, config.folder.width, "folder")
    question_factory.check_groups(config)
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
    reward_functions(config)
    parts = make_parts(config)
    token_models.check_halves(config, parts.model)
    open_records(config, parts)


class Parts(NamedTuple):
    """What the stages of a run share.

    Attributes:
      chat: the model's texts.
      images: image tokens of a picture.
      model: answers.
    """

    chat: Chat
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
      ValueError: see `open_folder`; or there are too few records for run.eval_episodes of them.
    """
    f = config.folder
    table = pathlib.Path(f.directory).resolve() / METADATA
    written = (table.stat().st_mtime_ns, table.stat().st_size) if table.is_file() else None
    return open_split(
        written,
        parts.chat,
        directory=table.parent,
        size=(f.height, f.width),
        resize=f.resize,
        batch_size=config.rl.questions,
        seed=config.seed,
        max_rejected=f.max_rejected,
        held_out=config.run.eval_episodes,
        answer_length=f.answer_tokens if config.sft.updates else None,
        length=f.prompt_tokens,
        images=parts.images,
    )


def tell_records(config: ml_collections.ConfigDict, records: Split) -> None:
    """Prints which records of a folder are left out, and what is done to the images."""
    f = config.folder
    tell_rejected(records)
    tell_images(records, (f.height, f.width), resize=f.resize)


def make_scorer(config: ml_collections.ConfigDict, chat: Chat) -> Scorer:
    """Scores answers by the functions of a config.

    Raises:
      ValueError: one cannot be imported, one is named twice, or there are not as many weights.
      RuntimeError: see `Pool`.
    """
    r, functions = config.rewards, reward_functions(config)
    weights = dict(zip(functions, r.weights, strict=True))
    return Scorer(Pool(functions, weights, workers=r.workers, timeout_s=r.timeout_s), chat)


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


def make_ask(
    config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh
) -> Callable[[Batch], Question]:
    """A function that puts the B questions of a batch on every device of a mesh."""
    length, images = config.folder.prompt_tokens, parts.images

    def ask(batch: Batch) -> Question:
        tokens, present = prompt_rows(parts.chat, batch.prompts, length=length, images=images)
        unnamed = np.zeros(len(tokens), np.int32)  # Of no table of a task's texts.
        arrays = tokens, present, batch.images, *(unnamed,) * 4
        return Question(*jax.device_put(arrays, mesh_lib.replicated(mesh)))

    return ask


def sft_stage(config: ml_collections.ConfigDict, mesh: Mesh) -> Stage:
    """Supervised fine-tuning on the answers of the records.

    Raises:
      ValueError: see `open_records`.
      RuntimeError: see `Pool`.
    """
    parts = make_parts(config)
    records = open_records(config, parts)
    tell_records(config, records)
    ask, scorer = make_ask(config, parts, mesh), make_scorer(config, parts.chat)
    measure = _make_measure(_make_greedy(config, parts, records.heldout, ask, scorer))
    batch = records.train.read(range(len(records.train)))
    length = config.folder.answer_tokens
    tokens, present = answer_rows(parts.chat, batch.answers, length=length)
    return token_stages.sft_stage(
        config,
        mesh,
        parts.model,
        (ask(batch), jnp.asarray(tokens), jnp.asarray(present)),
        evaluation=lambda frozen: token_stages.evaluation(measure, frozen, SPLIT),
        best_metric=BEST,
    )


def rl_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, *, start: Params | None = None
) -> Stage:
    """RL on what the reward functions return, from the pretrained model or a fine-tuned one.

    Raises:
      ValueError: see `open_records`.
      RuntimeError: see `Pool`.
    """
    r, parts = config.rl, make_parts(config)
    records, everywhere = open_records(config, parts), mesh_lib.replicated(mesh)
    learning = token_stages.make_learning(config, mesh, parts.model, start)
    ask, scorer = make_ask(config, parts, mesh), make_scorer(config, parts.chat)
    if not config.sft.updates:
        tell_records(config, records)

    def keys(rng: jax.Array, updates: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(rng, updates))

    @functools.partial(jax.jit, out_shardings=everywhere)
    def generate(
        params: Params, frozen: Any, asked: Question, rng: jax.Array, updates: jax.Array
    ) -> Generated:
        asked = mesh_lib.constrain_batch(asked, mesh=mesh)  # Each device answers its part.
        sampling = Sampling(temperature=r.temperature)
        key = keys(rng, updates)[0]
        return parts.policy.answer(params, frozen, asked, key, group=r.group, sampling=sampling)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def step(carry: Carry, frozen: Any, experience: Experience) -> tuple[Carry, Metrics]:
        key = keys(carry.rng, carry.updates)[1]
        carry, metrics = learning.step(carry, frozen, experience, key)
        unscored = {"answer/unscored": 1 - jnp.mean(experience.scored)}
        return carry, metrics | grpo.describe(experience) | unscored

    def placed(shapes: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
        )

    def on_host(carry: Carry, frozen: Any) -> HostUpdate:
        asked = ask(records.train.batch(0))
        generating = generate.lower(carry.learner.params, frozen, asked, carry.rng, carry.updates)
        number = placed(np.empty((r.questions, r.group), np.float32))
        learned_from = Experience(asked, placed(generating.out_info), number, number)
        stepping = step.lower(carry, frozen, learned_from)
        generated, stepped = generating.compile(), stepping.compile()

        def update(carry: Carry, frozen: Any) -> tuple[Carry, Metrics]:
            batch = records.train.batch(int(jax.device_get(carry.updates)))
            asked = ask(batch)
            answers = generated(carry.learner.params, frozen, asked, carry.rng, carry.updates)
            _, rewards = scorer(records.train, batch, answers)
            # NaN times a mask of 0 is NaN.
            numbers = np.where(rewards.valid, rewards.reward, 0), rewards.valid.astype(np.float32)
            reward, scored = jax.device_put(numbers, everywhere)
            return stepped(carry, frozen, Experience(asked, answers, reward, scored))

        return HostUpdate(update, placed(stepping.out_info[1]))

    measure = _make_measure(_make_greedy(config, parts, records.heldout, ask, scorer))

    return token_stages.make_stage(
        config,
        mesh,
        learning,
        update=None,
        on_host=on_host,
        samples_per_update=r.questions * r.group,
        evaluate=token_stages.evaluation(measure, learning.frozen, SPLIT),
        best_metric=BEST,
        console=("answer/reward", "answer/unscored", BEST, "time/samples_per_s"),
    )


def splits(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """What can be evaluated on: the records that are held out."""
    return (SPLIT,)


def make_measure(
    config: ml_collections.ConfigDict, *, episodes: int
) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    """The reported evaluation: (trained and frozen half, split) -> the 'return' of greedy answers.

    Raises:
      ValueError: `episodes` is not the number of records that are held out.
    """
    if episodes != config.run.eval_episodes:
        raise ValueError(
            f"{episodes} episodes, but the run holds out {config.run.eval_episodes} records; ask "
            "for as many."
        )
    return _make_measure(_greedy_of(config))


def answered_samples(
    config: ml_collections.ConfigDict, made_of: tuple[Params, Any], count: int
) -> list[Sample]:
    """The first questions that are held out, with the greedy answers of a policy.

    Args:
      config: of the run.
      made_of: trained and frozen half.
      count: the most that are returned.
    """
    batch, (completions, rewards) = _greedy_of(config)(made_of)
    return [
        Sample(
            batch.images[i], batch.prompts[i], batch.answers[i], text, float(rewards.reward[i, 0])
        )
        for i, (text,) in enumerate(completions[:count])
    ]


Greedy = Callable[[tuple[Params, Any]], tuple[Batch, Scored]]


def _greedy_of(config: ml_collections.ConfigDict) -> Greedy:
    """`_make_greedy` of a config alone."""
    parts = make_parts(config)
    return _make_greedy(
        config,
        parts,
        open_records(config, parts).heldout,
        make_ask(config, parts, make_mesh(config)),
        make_scorer(config, parts.chat),
    )


def _make_greedy(
    config: ml_collections.ConfigDict,
    parts: Parts,
    records: Records,
    ask: Callable[[Batch], Question],
    scorer: Scorer,
) -> Greedy:
    """Both halves -> the first batch of these records, and the greedy answers to it, G = 1."""
    batch = records.batch(0)
    asked = ask(batch)

    @jax.jit
    def answer(made_of: tuple[Params, Any], asked: Question) -> Generated:
        greedy = Sampling(temperature=0.0)
        return parts.policy.answer(*made_of, asked, jax.random.key(0), group=1, sampling=greedy)

    return lambda made_of: (batch, scorer(records, batch, answer(made_of, asked)))


def _make_measure(greedy: Greedy) -> Callable[[tuple[Params, Any], str], dict[str, float]]:
    """(both halves, split) -> mean reward of greedy answers, its interval, and its parts."""

    def measure(made_of: tuple[Params, Any], _: str) -> dict[str, float]:
        _, (_, rewards) = greedy(made_of)
        mean, low, high = bootstrap_interval(
            rewards.reward[rewards.valid], confidence=0.95, resamples=2000, seed=0
        )
        parts = {
            f"reward/{name}": float(part[rewards.valid].mean())
            for name, part in rewards.parts.items()
        }
        return {"return": mean, "return_lo": low, "return_hi": high} | parts

    return measure
