"""Tokenizes the records of a folder for a model, and scores the completions of the model."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from mmrl_jax.data import images as images_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.distributed.rows import join_shares
from mmrl_jax.pretrained.chat import ChatTokenizer, check_text
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks.folder import Batch, Records, open_folder
from mmrl_jax.tasks.prompts import pad_left
from mmrl_jax.tasks.reward_signatures import RESERVED
from mmrl_jax.tasks.reward_workers import printable
from mmrl_jax.tasks.rewards import Failure, NoRewards, Rewards, RewardWorkerPool
from mmrl_jax.tasks.samples import COMPLETION_REMEDY, short_repr
from mmrl_jax.training.dispatch import TRANSIENT

# Maximum number of kinds of failures that a process prints. reward/failed counts all failures.
MAX_PRINTED = 10


def tokenize_prompts(
    chat: ChatTokenizer, prompts: Sequence[str], *, length: int, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes B prompts with one image each.

    Args:
      chat: Tokenizer and chat template of the model.
      prompts: Texts of the B prompts.
      length: Number of tokens S to which prompts are padded on the left.
      images: Number of tokens of an image.

    Returns:
      Token ids int32 [B, S], and their mask bool [B, S], which is False for padding.

    Raises:
      ValueError: If a prompt has more than S tokens, or cannot be tokenized, see
        `ChatTokenizer.encode_prompt`.
    """
    rows = [chat.encode_prompt(text, images=images) for text in prompts]
    for text, ids in zip(prompts, rows, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"prompt {short_repr(text)} has {len(ids)} tokens, {images} of them for the image, "
                f"more than dataset.prompt_tokens={length}; raise it."
            )
    return pad_left(rows, length, chat.pad)


def tokenize_completions(
    chat: ChatTokenizer, answers: Sequence[str], *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes B completions with their stop tokens.

    Args:
      chat: Tokenizer and chat template of the model.
      answers: Texts of the B completions.
      length: Number of tokens T to which completions are padded on the right.

    Returns:
      Token ids int32 [B, T], and their mask bool [B, T], which is False for padding.

    Raises:
      ValueError: If a completion has more than T tokens, or cannot be tokenized, see
        `ChatTokenizer.encode_completion`.
    """
    rows = [chat.encode_completion(text) for text in answers]
    for text, ids in zip(answers, rows, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"answer {short_repr(text)} has {len(ids)} tokens, more than "
                f"dataset.completion_tokens={length}, but a stage learns from it; raise that key."
            )
    tokens = np.array([[*ids, *[chat.pad] * (length - len(ids))] for ids in rows], np.int32)
    return tokens, np.arange(length) < np.array([len(ids) for ids in rows])[:, None]


class Split(NamedTuple):
    """The records of a dataset by split.

    Attributes:
      train: Records that stages learn from, in batches of an update.
      validation: Records of the evaluations during training, which select the best checkpoint.
      test: Records of the reported evaluation.
    """

    train: Records
    validation: Records
    test: Records


def open_split(
    chat: ChatTokenizer,
    *,
    directory: pathlib.Path,
    files: str | None,
    test_directory: pathlib.Path | None,
    test_files: str | None,
    validation_size: int,
    test_size: int,
    split_seed: int,
    completion_length: int | None,
    length: int,
    images: int,
    **opening: Any,
) -> tuple[Split, frozenset[str]]:
    """Opens the records of a dataset and splits them.

    Args:
      chat: Tokenizer and chat template of the model.
      directory: Directory of the dataset.
      files: Pattern of the tables in the directory, see `open_folder`.
      test_directory: Directory of the test split; None if the test split is a part of `directory`.
      test_files: Pattern of the tables in the directory of the test split.
      validation_size: Minimum number of records in the validation split.
      test_size: Minimum number of records in the test split; 0 with a `test_directory`.
      split_seed: Seed of the splits, see `Records.split`.
      completion_length: Maximum number of tokens of an answer; None if no stage learns from
        answers, so that their length does not matter.
      length: Maximum number of tokens of a prompt.
      images: Number of tokens of an image.
      **opening: Further arguments of `open_folder`.

    Returns:
      The records by split, and the names of the columns that at least one record has.

    Raises:
      ValueError: If a folder cannot be opened, see `open_folder`, there are too few records for
        the held-out splits, or an image of `test_directory` is in `directory` too.
    """
    names: set[str] = set()

    def check(prompt: str, answer: str, columns: Mapping[str, Any]) -> None:
        check_text(prompt, "prompt")
        check_text(answer, "answer")
        for column in columns.items():
            check_text(json.dumps(column, ensure_ascii=False, default=str), "column")
        tokenize_prompts(chat, [prompt], length=length, images=images)
        if completion_length is not None:
            tokenize_completions(chat, [answer], length=completion_length)
        reserved = [name for name in RESERVED if name in columns]
        if reserved:
            remedy = COMPLETION_REMEDY if "completion" in reserved else ""
            raise ValueError(
                f"columns {reserved} are reserved arguments of reward functions; rename them in "
                f"the records. {remedy}".rstrip()
            )
        names.update(columns)

    records = open_folder(directory, files=files, check=check, **opening)
    # The test split comes first, so that it does not depend on the size of the validation split.
    sizes = {"test": test_size, "validation": validation_size}
    try:
        parts = records.split(sizes, seed=split_seed)
    except ValueError as error:
        raise ValueError(
            f"dataset.validation_size={validation_size}, dataset.test_size={test_size}: {error}"
        ) from error
    if test_directory is not None:
        parts["test"] = open_folder(test_directory, files=test_files, check=check, **opening)
        _check_disjoint(records, parts["test"])
    return Split(**parts), frozenset(names)


def _check_disjoint(records: Records, test: Records) -> None:
    """Raises ValueError if a test record has the same image as another record."""
    names = {info.digest: name for name, info in zip(records.names, records.images, strict=True)}
    shared = [
        (name, names[info.digest])
        for name, info in zip(test.names, test.images, strict=True)
        if info.digest in names
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(test)} records of dataset.test_directory have an image that "
            f"dataset.directory has too, first {shared[0][0]} that of {shared[0][1]} there: a "
            "model must not be tested on images from which it has learned. Remove them from one "
            "of the two."
        )


def print_rejected(records: Split) -> None:
    """Prints the number of rejected records, and the first ones with their reasons."""
    lists = {"": records.train.rejected}
    if records.test.rejected is not records.train.rejected:  # The test split has its own folder.
        lists[" of dataset.test_directory"] = records.test.rejected
    for where, rejected in lists.items():
        if rejected:
            print(f"{len(rejected)} records{where} are left out.", file=sys.stderr, flush=True)
        for name, reason in rejected[:MAX_PRINTED]:
            print(
                f"Rejected record{where}: {name}: {printable(reason)}", file=sys.stderr, flush=True
            )


def print_image_summary(records: Split, size: tuple[int, int], *, resize: str) -> None:
    """Prints how the images of a folder are changed before a model receives them.

    Args:
      records: Records of the dataset.
      size: Height and width in pixels to which the images are resized.
      resize: Method of resizing, see `images.fit`.
    """
    infos = {info.digest: info for part in records for info in part.images}
    for text in images_lib.summary(infos.values(), size, resize=resize):
        print(text, file=sys.stderr, flush=True)


class ScoredTexts(NamedTuple):
    """Texts and rewards of G completions for each of B prompts.

    Attributes:
      completions: Texts of the completions that this process has scored, lists of G texts.
      rewards: Rewards of all completions; its `failures` are those of this process.
      failed: Fraction of the calls of reward functions that failed, in [0, 1].
    """

    completions: list[list[str]]
    rewards: Rewards
    failed: float


def _token_ids(completions: Completions) -> list[list[list[int]]]:
    """Returns the token ids of completions [n, G, T] without padding, with their stop tokens."""
    return [
        [row[row_mask].tolist() for row, row_mask in zip(*group, strict=True)]
        for group in zip(completions.tokens, completions.mask, strict=True)
    ]


class Scorer:
    """Scores completions of the prompts of a folder with reward functions.

    The worker processes end when the pool is garbage-collected or this process ends.

    Args:
      pool: Pool of workers that call the reward functions.
      chat: Tokenizer that decodes completions.
    """

    def __init__(self, pool: RewardWorkerPool, chat: ChatTokenizer):
        self._pool, self._chat = pool, chat
        self._printed: set[tuple[str, str]] = set()

    def __call__(
        self,
        records: Records,
        batch: Batch,
        completions: Completions,
        *,
        shares: list[np.ndarray] | None = None,
        allow_none: bool = False,
        meanwhile: Any = None,
    ) -> ScoredTexts:
        """Decodes and scores completions [B, G, T] of the prompts of a batch.

        In a run of several processes each scores its share, and gets the rewards of all.

        Args:
          records: Records that the batch is from, for the names in messages.
          batch: Records in the share of this process.
          completions: Completions of these records, as host arrays [n, G, ...].
          shares: For each process the indices in [0, B) of the records in its share; None if this
            process has all of them.
          allow_none: Whether no error is raised if no completion has a reward.
          meanwhile: Arrays that the devices compute while the functions are called. They are ready
            before the processes exchange the rewards, because programs that communicate must run
            in the same order in all of them.

        Raises:
          NoRewards: If no completion has a reward and `allow_none` is False.
        """
        shares = shares or [np.arange(len(batch.prompts))]
        alone = len(shares) == 1
        texts = self.decode(completions)

        def score() -> Rewards:
            if not texts:
                shape = completions.finished.shape
                nothing = np.zeros(shape, np.float32)
                parts = dict.fromkeys(self._pool.names, nothing)
                no = np.zeros(shape, bool)
                return Rewards(nothing, no, parts, dict.fromkeys(parts, no), ())
            return self._pool(
                batch.prompts,
                texts,
                batch.answers,
                batch.columns,
                np.asarray(completions.finished),
                messages=batch.messages,
                completion_ids=_token_ids(completions) if self._pool.takes_ids else None,
                allow_none=allow_none or not alone,
            )

        def score_meanwhile() -> Rewards:
            try:
                with jax.profiler.TraceAnnotation("rewards"):
                    return score()
            finally:
                jax.block_until_ready(meanwhile)

        rewards = multihost.on_all(score_meanwhile, transient=TRANSIENT)
        self._print_failures(rewards, records, batch)
        if alone:
            return ScoredTexts(texts, rewards, rewards.failed)
        failures = np.zeros(rewards.reward.shape, np.int32)
        for failure in rewards.failures:
            failures[failure.prompt, failure.completion] += 1
        whole = rewards.reward, rewards.valid, rewards.parts, rewards.applies, failures
        reward, valid, parts, applies, failures = join_shares(whole, shares)
        if not valid.any() and not allow_none:
            raise NoRewards(
                f"None of {reward.size} samples has a reward: {failures.sum()} calls failed. Each "
                "process prints the failures of its own calls."
            )
        scored = Rewards(reward, valid, parts, applies, rewards.failures)
        return ScoredTexts(texts, scored, float(failures.mean() / len(parts)))

    def decode(self, completions: Completions) -> list[list[str]]:
        """Returns the texts of completions, host arrays [n, G, ...], as n lists of G texts."""
        return [
            [self._chat.decode(row[row_mask]) for row, row_mask in zip(*group, strict=True)]
            for group in zip(completions.tokens, completions.mask, strict=True)
        ]

    def check_functions(
        self, records: Records, rows: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Scores the answers of the first batch, so that broken functions fail before compilation.

        Prints a warning if none of them has a reward above 0.

        Args:
          records: Records of a stage.
          rows: Indices in the batch of the records to score; None for all of them.

        Raises:
          NoRewards: If no answer of these records has a reward.
        """
        batch, ids = records.batch(0, rows), None
        if self._pool.takes_ids:
            ids = [[self._chat.encode_completion(text)] for text in batch.answers]
        rewards = self._pool(
            batch.prompts,
            [[text] for text in batch.answers],
            batch.answers,
            batch.columns,
            messages=batch.messages,
            completion_ids=ids,
        )
        self._print_failures(rewards, records, batch)
        right = rewards.reward[rewards.valid]
        if (right <= 0).all():
            print(
                "None of the reference answers of the first batch has a reward above 0, for "
                f"example {short_repr(batch.answers[0])}. Where a right answer should have one, "
                "the reward functions do not read answers as the records write them.",
                file=sys.stderr,
                flush=True,
            )

    def _print_failures(self, rewards: Rewards, records: Records, batch: Batch) -> None:
        for failure in rewards.failures:
            self._print_failure(failure, records.names[batch.records[failure.prompt]])

    def _print_failure(self, failure: Failure, record: str) -> None:
        """Prints a failure, unless the function has failed in the same way before."""
        key = failure.function, failure.kind
        if key in self._printed or len(self._printed) == MAX_PRINTED:
            return
        self._printed.add(key)
        effect = "is masked out" if math.isnan(failure.value) else f"counts as {failure.value}"
        print(
            f"The reward of a completion of {record} failed: {failure.function}: {failure.reason}. "
            f"It {effect}; further failures of this kind are only counted in reward/failed.",
            file=sys.stderr,
            flush=True,
        )
