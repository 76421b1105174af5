"""The records of a folder as a model reads them, and the rewards of what it answers."""

from collections.abc import Mapping, Sequence
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from mmrl_jax.pretrained.chat import Chat, check_text
from mmrl_jax.rollouts.generate import Generated
from mmrl_jax.tasks import images as images_lib
from mmrl_jax.tasks.folder import Batch, Records, open_folder, shown
from mmrl_jax.tasks.rewards import Failure, Pool, Rewards

GIVEN = ("prompt", "completion", "answer")  # To reward functions, beside a record's columns.
TOLD = 10  # Reasons of failures that a process prints; answer/unscored counts them all.


def prompt_rows(
    chat: Chat, prompts: Sequence[str], *, length: int, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of B prompts, int32 [B, S], padded on the left, and which are there, bool [B, S].

    Args:
      chat: the model's texts.
      prompts: B questions about a picture each.
      length: S.
      images: image tokens of a picture.

    Raises:
      ValueError: one is longer than S, folder.prompt_tokens; or see `Chat.prompt`.
    """
    rows = [chat.prompt(text, images=images) for text in prompts]
    for text, ids in zip(prompts, rows, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"prompt {shown(text)} has {len(ids)} tokens, {images} of them of the image, more "
                f"than folder.prompt_tokens={length}; raise it."
            )
    # Backwards, padding behind is padding before.
    tokens, present = _padded([ids[::-1] for ids in rows], length, chat.pad)
    return tokens[:, ::-1], present[:, ::-1]


def answer_rows(
    chat: Chat, answers: Sequence[str], *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of B answers with their stop tokens, int32 [B, T], and which are there, bool.

    Raises:
      ValueError: one is longer than T, the length; or see `Chat.answer`.
    """
    rows = [chat.answer(text) for text in answers]
    for text, ids in zip(answers, rows, strict=True):
        if len(ids) > length:
            raise ValueError(
                f"answer {shown(text)} has {len(ids)} tokens, more than "
                f"folder.answer_tokens={length}, and is to be learned from; raise it."
            )
    return _padded(rows, length, chat.pad)


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, int32 [B, length], padded behind, and which are there."""
    tokens = np.array([[*ids, *[pad] * (length - len(ids))] for ids in rows], np.int32)
    return tokens, np.arange(length) < np.array([len(ids) for ids in rows])[:, None]


class Split(NamedTuple):
    """The records of a folder.

    Attributes:
      train: in batches of rl.questions.
      heldout: run.eval_episodes of them, in one batch, for evaluation alone.
    """

    train: Records
    heldout: Records


@functools.lru_cache(maxsize=1)  # A run opens its folder several times, which reads all pictures.
def open_split(
    written: tuple[int, int] | None,
    chat: Chat,
    *,
    held_out: int,
    answer_length: int | None,
    length: int,
    images: int,
    **opening: Any,
) -> Split:
    """The records of a folder.

    Args:
      written: time and size of its table, which with the rest tell one opening from another.
      chat: the model's texts.
      held_out: how many records are.
      answer_length: the most tokens of an answer; None where none is learned from.
      length: the most tokens of a prompt.
      images: image tokens of a picture.
      **opening: see `open_folder`.

    Raises:
      ValueError: see `open_folder`; or there are too few records for so many to be held out.
    """

    def usable(prompt: str, answer: str, columns: Mapping[str, Any]) -> None:
        check_text(prompt, "prompt")
        check_text(answer, "answer")
        for column in columns.items():
            check_text(json.dumps(column, ensure_ascii=False), "column")
        prompt_rows(chat, [prompt], length=length, images=images)
        if answer_length is not None:
            answer_rows(chat, [answer], length=answer_length)
        taken = [name for name in GIVEN if name in columns]
        if taken:
            raise ValueError(f"columns {taken} are what reward functions are given already.")

    records = open_folder(check=usable, **opening)
    try:
        return Split(*records.divided(held_out))
    except ValueError as error:
        raise ValueError(f"run.eval_episodes={held_out}: {error}") from error


def tell_rejected(records: Split) -> None:
    """Prints the first records that were left out, and why."""
    for name, reason in records.train.rejected[:TOLD]:
        print(f"Left out: {name}: {reason}", file=sys.stderr, flush=True)


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

    def __init__(self, pool: Pool, chat: Chat):
        self._pool, self._chat = pool, chat
        self._told: set[tuple[str, str]] = set()

    def __call__(self, records: Records, batch: Batch, answers: Generated) -> Scored:
        """Texts and rewards [B, G] of answers [B, G, T] to the questions of a batch.

        Raises:
          NoRewards: not a single answer has one.
        """
        tokens, present = jax.device_get((answers.tokens, answers.present))
        completions = [
            [self._chat.decode(row[there]) for row, there in zip(*group, strict=True)]
            for group in zip(tokens, present, strict=True)
        ]
        rewards = self._pool(batch.prompts, completions, batch.answers, batch.columns)
        for failure in rewards.failures:
            self._tell(failure, records.names[batch.records[failure.prompt]])
        return Scored(completions, rewards)

    def _tell(self, failure: Failure, record: str) -> None:
        """Prints a failure, of a function and a reason only the first."""
        what = failure.function, failure.reason
        if what in self._told or len(self._told) == TOLD:
            return
        self._told.add(what)
        print(
            f"No reward of an answer to {record}: {failure.function}: {failure.reason}. It is left "
            "out; further ones for this reason are only counted, see answer/unscored.",
            file=sys.stderr,
            flush=True,
        )
