"""Samples that are audited: image-text records and episodes of demonstrations, in memory."""

import abc
from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from mmrl_jax.auditing import images as images_lib


class Unreadable(NamedTuple):
    """A sample that cannot be used.

    Attributes:
      split: Index of its split.
      id: Name of the sample in its split.
      digest: Digest of the data set that has it, see `Samples`; '' for a record.
      reason: Reason why it cannot be used.
    """

    split: int
    id: str
    digest: str
    reason: str


class Finding(NamedTuple):
    """The result of a check.

    Attributes:
      scores: Score of each sample, float32 [N], higher for worse ones; NaN where it has none.
      partner: Index of another sample that explains the score, int64 [N]; -1 for none.
      notes: Explanation of the score of a sample, by its index; others need none.
    """

    scores: np.ndarray
    partner: np.ndarray
    notes: dict[int, str]


def scored(scores: np.ndarray) -> Finding:
    """Returns a finding of scores alone."""
    return Finding(np.asarray(scores, np.float32), np.full(len(scores), -1), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(abc.ABC):
    """N samples of one or more splits.

    Args:
      splits: Names of the splits.
      split: Index of the split of each sample, int64 [N].
      ids: Name of each sample in its split.
      digests: Digest of the content of each sample, or of the data set that has it, by which a file
        of weights is recognized as one of other data.
      unreadable: Samples that cannot be used, which are not among the N.
    """

    splits: tuple[str, ...]
    split: np.ndarray
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @abc.abstractmethod
    def picture(self, i: int) -> np.ndarray | None:
        """Returns an image of a sample, uint8 [H, W, 3]; None if it has none."""

    @abc.abstractmethod
    def caption(self, i: int) -> str:
        """Returns the text of a sample."""

    def missing(self) -> np.ndarray:
        """Returns the scores of a check that does not apply to any sample, NaN float32 [N]."""
        return np.full(len(self), np.nan, np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTexts(Samples):
    """Records of image, prompt and answer.

    Args:
      images: Images, resized to squares, uint8 [N, S, S, 3].
      image_digests: Digest of each image, which is the same for copies of a file.
      prompts: Text of each prompt.
      answers: Text of each reference answer.
    """

    images: np.ndarray
    image_digests: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    @functools.cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Features of the images by their kind, see `images.features`."""
        return images_lib.features(self.images)

    @functools.cached_property
    def descriptors(self) -> images_lib.Descriptors:
        """What images are compared by, see `images.descriptors`."""
        return images_lib.descriptors(self.images)

    def picture(self, i: int) -> np.ndarray | None:
        return self.images[i]

    def caption(self, i: int) -> str:
        return f"{self.prompts[i]}\n{self.answers[i]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames:
    """What is kept of the images of R steps of N episodes.

    Args:
      first: First image of each episode, uint8 [N, S, S, 3].
      last: Last image of each episode, uint8 [N, S, S, 3].
      worst: Image of each episode with the least or the most structure, uint8 [N, S, S, 3].
      means: Means of 8 x 8 blocks of each image, uint8 [R, 8, 8, 3].
      deviation: Standard deviation of each image, float32 [R], see `images.deviation`.
      roughness: Roughness of each image, float32 [R], see `images.roughness`.
      repeated: Whether an image is exactly the one before it in its episode, bool [R].
    """

    first: np.ndarray
    last: np.ndarray
    worst: np.ndarray
    means: np.ndarray
    deviation: np.ndarray
    roughness: np.ndarray
    repeated: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes(Samples):
    """Episodes of demonstrations, whose N episodes have R steps together.

    Args:
      starts: First step of each episode, and R, int64 [N + 1].
      proprio: Proprioceptive readings, float32 [R, P].
      action: Actions, float32 [R, A]; discrete ones as one-hot vectors.
      has_action: Whether a step has an action, which final observations have not, bool [R].
      instructions: Instruction of each episode, that of its first step; '' if it has none.
      frames: What is kept of the images; None if there are none.
    """

    starts: np.ndarray
    proprio: np.ndarray
    action: np.ndarray
    has_action: np.ndarray
    instructions: tuple[str, ...]
    frames: Frames | None

    @functools.cached_property
    def episode(self) -> np.ndarray:
        """Episode of each step, int64 [R]."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def picture(self, i: int) -> np.ndarray | None:
        if self.frames is None:
            return None
        f = self.frames
        return np.concatenate([f.first[i], f.worst[i], f.last[i]], axis=1)

    def caption(self, i: int) -> str:
        steps = self.starts[i + 1] - self.starts[i]
        return f"{self.instructions[i] or '(no instruction)'}\n{steps} steps"


def concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the arrays of several splits as one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
