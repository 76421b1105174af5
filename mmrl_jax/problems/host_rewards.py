"""The records of a folder as a model reads them, and the rewards of what it answers."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from mmrl_jax.pretrained.chat import ChatTokenizer, check_text
from mmrl_jax.rollouts.generate import Completions
from mmrl_jax.tasks import images as images_lib
from mmrl_jax.tasks.folder import Batch, Records, open_folder, shown
from mmrl_jax.tasks.reward_workers import printable
from mmrl_jax.tasks.rewards import RESERVED, Failure, Rewards, RewardWorkerPool

TOLD = 10  # Reasons of failures that a process prints; reward/failed counts all failures.


def prompt_rows(
    chat: ChatTokenizer, prompts: Sequence[str], *, length: int, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of B prompts, int32 [B, S], padded on the left, and which are there, bool [B, S].

    Args:
      chat: the model's texts.
      prompts: B questions about a picture each.
      length: S.
      images: image tokens of a picture.

    Raises:
      ValueError: one is longer than S, dataset.prompt_tokens; or see `ChatTokenizer.prompt`.
    """
    rows = [chat.prompt(text, images=images) for text in prompts]
    for text, ids in zip(prompts, rows, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"prompt {shown(text)} has {len(ids)} tokens, {images} of them of the image, more "
                f"than dataset.prompt_tokens={length}; raise it."
            )
    # Backwards, padding behind is padding before.
    tokens, present = _padded([ids[::-1] for ids in rows], length, chat.pad)
    return tokens[:, ::-1], present[:, ::-1]


def completion_rows(
    chat: ChatTokenizer, answers: Sequence[str], *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of B answers with their stop tokens, int32 [B, T], and which are there, bool.

    Raises:
      ValueError: one is longer than T, the length; or see `ChatTokenizer.answer`.
    """
    rows = [chat.answer(text) for text in answers]
    for text, ids in zip(answers, rows, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"answer {shown(text)} has {len(ids)} tokens, more than "
                f"dataset.completion_tokens={length}, and is to be learned from; raise it."
            )
    return _padded(rows, length, chat.pad)


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, int32 [B, length], padded behind, and which are there."""
    tokens = np.array([[*ids, *[pad] * (length - len(ids))] for ids in rows], np.int32)
    return tokens, np.arange(length) < np.array([len(ids) for ids in rows])[:, None]


class Split(NamedTuple):
    """The records of a dataset.

    Attributes:
      train: in batches of an update's prompts.
      validation: for evaluation while training, by which the best checkpoint is chosen.
      test: for the evaluation that is reported.
    """

    train: Records
    validation: Records
    test: Records


def open_split(
    chat: ChatTokenizer,
    *,
    directory: pathlib.Path,
    test_directory: pathlib.Path | None,
    validation_size: int,
    test_size: int,
    split_seed: int,
    completion_length: int | None,
    length: int,
    images: int,
    **opening: Any,
) -> Split:
    """The records of a dataset.

    Args:
      chat: the model's texts.
      directory: the dataset.
      test_directory: a folder of the test split alone, or None for a part of the other one.
      validation_size: least number of records of the validation split.
      test_size: least number of records of the test split; 0 with a folder of its own.
      split_seed: of the splits, see `Records.split`.
      completion_length: the most tokens of an answer; None where none is learned from.
      length: the most tokens of a prompt.
      images: image tokens of a picture.
      **opening: see `open_folder`.

    Raises:
      ValueError: see `open_folder`; there are too few records for so many to be held out; or an
        image of the test folder is in the other folder too.
    """

    def usable(prompt: str, answer: str, columns: Mapping[str, Any]) -> None:
        check_text(prompt, "prompt")
        check_text(answer, "answer")
        for column in columns.items():
            check_text(json.dumps(column, ensure_ascii=False), "column")
        prompt_rows(chat, [prompt], length=length, images=images)
        if completion_length is not None:
            completion_rows(chat, [answer], length=completion_length)
        taken = [name for name in RESERVED if name in columns]
        if taken:
            raise ValueError(f"columns {taken} are what reward functions are given already.")

    records = open_folder(directory, check=usable, **opening)
    # The test split comes first, so that it does not depend on the size of the other one.
    sizes = {"test": test_size, "validation": validation_size}
    try:
        parts = records.split(sizes, seed=split_seed)
    except ValueError as error:
        raise ValueError(
            f"dataset.validation_size={validation_size}, dataset.test_size={test_size}: {error}"
        ) from error
    if test_directory is not None:
        parts["test"] = open_folder(test_directory, check=usable, **opening)
        _check_unseen(records, parts["test"])
    return Split(**parts)


def _check_unseen(records: Records, test: Records) -> None:
    """Raises ValueError if an image of the test records is among those of the others."""
    seen = {info.digest: name for name, info in zip(records.names, records.images, strict=True)}
    shared = [
        (name, seen[info.digest])
        for name, info in zip(test.names, test.images, strict=True)
        if info.digest in seen
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(test)} records of dataset.test_directory have an image that "
            f"dataset.directory has too, first {shared[0][0]} that of {shared[0][1]} there: a "
            "model is not tested on what it learned from. Take them out of one of the two."
        )


def tell_rejected(records: Split) -> None:
    """Prints the first records that were left out, and why."""
    lists = {"": records.train.rejected}
    if records.test.rejected is not records.train.rejected:  # Of a folder of its own.
        lists[" of dataset.test_directory"] = records.test.rejected
    for where, rejected in lists.items():
        for name, reason in rejected[:TOLD]:
            print(f"Left out{where}: {name}: {printable(reason)}", file=sys.stderr, flush=True)


def tell_images(records: Split, size: tuple[int, int], *, resize: str) -> None:
    """Prints what is done to the images of a folder, for arguments see `images.fit`."""
    infos = {info.digest: info for part in records for info in part.images}
    for text in images_lib.summary(infos.values(), size, resize=resize):
        print(text, file=sys.stderr, flush=True)


class Scored(NamedTuple):
    """G answers to each of B questions.

    Attributes:
      completions: B times G texts.
      rewards: for them.
    """

    completions: list[list[str]]
    rewards: Rewards


class Scorer:
    """Rewards of answers to a folder's questions.

    The pool's processes end when nothing refers to it any more, or at the end of this one.

    Args:
      pool: calls the reward functions.
      chat: the model's texts.
    """

    def __init__(self, pool: RewardWorkerPool, chat: ChatTokenizer):
        self._pool, self._chat = pool, chat
        self._told: set[tuple[str, str]] = set()

    def __call__(
        self, records: Records, batch: Batch, answers: Completions, *, allow_none: bool = False
    ) -> Scored:
        """Texts and rewards [B, G] of answers [B, G, T] to the questions of a batch.

        Raises:
          NoRewards: not a single answer has one, and that is not allowed.
        """
        tokens, present, finished = jax.device_get(
            (answers.tokens, answers.present, answers.finished)
        )
        completions = [
            [self._chat.decode(row[there]) for row, there in zip(*group, strict=True)]
            for group in zip(tokens, present, strict=True)
        ]
        rewards = self._pool(
            batch.prompts,
            completions,
            batch.answers,
            batch.columns,
            finished,
            allow_none=allow_none,
        )
        self._tell_all(rewards, records, batch)
        return Scored(completions, rewards)

    def rehearse(self, records: Records) -> None:
        """Scores the records' own answers, to find before compiling that no function works.

        Raises:
          NoRewards: not a single answer of the first batch has a reward.
        """
        batch = records.batch(0)
        rewards = self._pool(
            batch.prompts, [[text] for text in batch.answers], batch.answers, batch.columns
        )
        self._tell_all(rewards, records, batch)

    def _tell_all(self, rewards: Rewards, records: Records, batch: Batch) -> None:
        for failure in rewards.failures:
            self._tell(failure, records.names[batch.records[failure.prompt]])

    def _tell(self, failure: Failure, record: str) -> None:
        """Prints a failure, of a function and a reason only the first."""
        what = failure.function, failure.reason
        if what in self._told or len(self._told) == TOLD:
            return
        self._told.add(what)
        counts = "is left out" if math.isnan(failure.value) else f"counts as {failure.value}"
        print(
            f"No reward of an answer to {record}: {failure.function}: {failure.reason}. It "
            f"{counts}; further ones for this reason are only counted, see reward/failed.",
            file=sys.stderr,
            flush=True,
        )
