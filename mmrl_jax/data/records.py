"""The record of an episode, its checks, and the quarantine of episodes that fail them.

Steps are aligned as in RLDS (Ramos et al., 2021, "RLDS: an Ecosystem to Generate, Share and Use
Datasets in Reinforcement Learning"): step t has the observation o_t, the action a_t that was taken
there, and the reward and discount that followed. The last step of an RLDS episode has the final
observation alone, so that its action, reward and discount mean nothing.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
import difflib
import math
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

Reason = Literal[
    "empty episode",
    "missing field",
    "wrong schema",
    "mixed image sizes",
    "damaged image",
    "missing image",
    "missing video",
    "truncated video",
    "damaged shard",
    "truncated shard",
    "non-finite action",
    "non-finite reward",
    "non-finite observation",
    "wrong flags",
    "invalid text",
    "unknown instruction",
]
MAX_EXAMPLES = 20  # Number of quarantined episodes whose names and messages are kept.


class Invalid(ValueError):
    """An episode that cannot be used.

    Args:
      reason: Kind of the fault, by which quarantined episodes are counted.
      message: Field, value and place of the fault.
    """

    def __init__(self, reason: Reason, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message


class InvalidData(ValueError):
    """A data set that cannot be used as a whole, for example because a field is missing."""


class Feature(NamedTuple):
    """Shape and dtype of a field of one step.

    Attributes:
      shape: Shape without the axis of steps; None for a size that may differ.
      dtype: Name of the numpy dtype; 'image' for an encoded image, 'str' for text.
    """

    shape: tuple[int | None, ...]
    dtype: str

    @property
    def is_image(self) -> bool:
        """Whether the field has images as pixels, uint8 [H, W, 3]."""
        return self.dtype == "uint8" and len(self.shape) == 3 and self.shape[-1] == 3


def feature_of(x: np.ndarray) -> Feature:
    """Returns the shape and dtype of a field of one step, from its values [N, ...]."""
    return Feature(x.shape[1:], x.dtype.name)


class Provenance(NamedTuple):
    """Origin of an episode.

    Attributes:
      policy: Name of the policy that acted.
      seed: Seed of the recording.
      split: Split of the environment.
      number: Number of the episode in its recording.
      episode_return: Sum of the rewards.
      success: 1.0 if the episode succeeded, 0.0 if not; NaN if that is unknown.
    """

    policy: str = ""
    seed: int = 0
    split: str = ""
    number: int = 0
    episode_return: float = math.nan
    success: float = math.nan


class Episode(NamedTuple):
    """The record of one episode with N steps.

    Attributes:
      observation: Observations by name: 'pixels' uint8 [N, H, W, 3], 'proprio' float32 [N, P].
      action: Actions, float32 [N, A], or int32 [N] for discrete actions.
      reward: Reward that followed each action, float32 [N].
      discount: 0 where the environment terminated after the action, else 1, float32 [N].
      is_first: True for the first step alone, bool [N].
      is_last: True for the last step alone, bool [N].
      is_terminal: True for the last step if the environment terminated, bool [N]; False if a limit
        truncated the episode.
      language_instruction: Instruction at each step, a sequence of N texts.
      privileged: Further targets for training by name, float32 [N, ...]; no policy observes them.
      final_observation: Whether the last step has only an observation, as in RLDS.
      provenance: Origin of the episode.
    """

    observation: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    language_instruction: Sequence[str]
    privileged: dict[str, np.ndarray]
    final_observation: bool
    provenance: Provenance

    def fields(self) -> dict[str, np.ndarray]:
        """Returns all arrays by the paths of their fields, for example 'observation/pixels'."""
        arrays = {f"observation/{name}": x for name, x in self.observation.items()}
        arrays |= {f"privileged/{name}": x for name, x in self.privileged.items()}
        for name in ("action", "reward", "discount", "is_first", "is_last", "is_terminal"):
            arrays[name] = getattr(self, name)
        return arrays

    @property
    def actions(self) -> int:
        """Number of steps with an action."""
        return max(len(self.action) - self.final_observation, 0)


Schema = Mapping[str, Feature]


def schema_of(episode: Episode) -> dict[str, Feature]:
    """Returns the fields of an episode, which is assumed to be valid, by their paths."""
    return {name: feature_of(x) for name, x in episode.fields().items()}


def check(episode: Episode, schema: Schema) -> None:
    """Checks an episode.

    Args:
      episode: Episode to check.
      schema: Fields that it must have, by their paths; further fields are not allowed.

    Raises:
      Invalid: If the episode has no action, a field is missing or has another shape or dtype, an
        observation, action or reward is not finite, or the flags of the steps are inconsistent.
    """
    steps, actions, arrays = len(episode.action), episode.actions, episode.fields()
    if actions == 0:
        raise Invalid("empty episode", f"it has {steps} steps and no action.")
    for name in sorted(schema.keys() ^ arrays.keys()):
        if name in schema:
            raise Invalid("missing field", f"{name!r} is missing; it has {sorted(arrays)}.")
        raise Invalid("wrong schema", f"{name!r} is in no other episode.")
    for name, feature in schema.items():
        x = arrays[name]
        if x.dtype.name != feature.dtype or not _matches(x.shape, (steps, *feature.shape)):
            reason: Reason = "mixed image sizes" if x.ndim == 4 else "wrong schema"
            raise Invalid(
                reason,
                f"{name!r} is {x.dtype.name} {list(x.shape)}, but must be {feature.dtype} "
                f"{[steps, *feature.shape]}.",
            )
    _check_finite(episode, actions)
    _check_flags(episode)
    texts = episode.language_instruction
    if len(texts) != steps or not all(isinstance(text, str) for text in texts):
        raise Invalid("invalid text", f"language_instruction does not have {steps} texts.")


def _check_finite(episode: Episode, actions: int) -> None:
    """Raises Invalid for a number that is not finite, unless nothing reads it."""
    for name, x in episode.fields().items():
        if x.dtype.kind != "f":
            continue
        kind = name.partition("/")[0]
        # The action and reward of a final observation mean nothing.
        bad = ~np.isfinite(x[:actions] if kind in ("action", "reward", "discount") else x)
        if bad.any():
            step = int(np.argwhere(bad)[0][0])
            kinds: dict[str, Reason] = {"action": "non-finite action"}
            kinds |= {"reward": "non-finite reward", "discount": "non-finite reward"}
            raise Invalid(
                kinds.get(kind, "non-finite observation"), f"{name!r} at step {step} is {x[step]}."
            )


def _check_flags(episode: Episode) -> None:
    steps = len(episode.action)
    first, last = np.zeros((2, steps), bool)
    first[0], last[-1] = True, True
    terminal = np.asarray(episode.is_terminal)
    for name, x, expected in (
        ("is_first", episode.is_first, first),
        ("is_last", episode.is_last, last),
        ("is_terminal", terminal, terminal & last),
    ):
        if not np.array_equal(x, expected):
            raise Invalid("wrong flags", f"{name} is true at steps {np.flatnonzero(x)} of {steps}.")


def _matches(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        b is None or a == b for a, b in zip(shape, expected, strict=True)
    )


class RawEpisode(NamedTuple):
    """An episode as its data set has it.

    Attributes:
      fields: Values of N steps by the names of the data set: an array [N, ...], a list of encoded
        images, or a list of texts.
      final_observation: Whether the last step has only an observation.
      provenance: Origin of the episode, as far as it is known.
    """

    fields: dict[str, Any]
    final_observation: bool
    provenance: Provenance


class EpisodeSource(Protocol):
    """A data set with random access to its episodes."""

    @property
    def features(self) -> Mapping[str, Feature]:
        """Fields of a step by the names of the data set."""

    @property
    def defaults(self) -> Mapping[str, str]:
        """Fields of the data set by our names, where a mapping does not name another."""

    def __len__(self) -> int:
        """Returns the number of episodes that the metadata of the data set declare."""

    def name(self, index: int) -> str:
        """Returns the place of an episode for messages, for example its file and its number."""

    def read(self, index: int, fields: Collection[str]) -> RawEpisode:
        """Reads some fields of an episode.

        Raises:
          Invalid: If the episode is missing, damaged, or not as the metadata declare it.
        """


class Quarantine:
    """Episodes that were set aside, counted by reason.

    Attributes:
      counts: Number of episodes by reason.
      examples: Name and message of the first MAX_EXAMPLES episodes.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, examples: Sequence = ()):
        self.counts = Counter(counts or {})
        self.examples = [(str(name), str(message)) for name, message in examples]

    def add(self, name: str, error: Invalid) -> None:
        """Counts an episode, by its name and its fault."""
        self.counts[error.reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((name, str(error)))

    def __add__(self, other: "Quarantine") -> "Quarantine":
        examples = [*self.examples, *other.examples][:MAX_EXAMPLES]
        return Quarantine(self.counts + other.counts, examples)

    @property
    def total(self) -> int:
        """Number of episodes that were set aside."""
        return self.counts.total()

    def summary(self) -> str:
        """Returns the counts and the first examples as text; '' if there are none."""
        if not self.total:
            return ""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        lines = "\n".join(f"  {name}: {message}" for name, message in self.examples[:5])
        return f"{self.total} episodes were set aside ({counts}). The first:\n{lines}"

    def to_json(self) -> dict[str, Any]:
        """Returns the counts and examples in values that JSON supports."""
        return {"counts": dict(self.counts), "examples": self.examples}


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns a sentence with the names that are closest to one that is not known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    # The last part of a path is compared too: 'pixels' is close to 'observation/pixels'.
    close += [x for x in known if name.split("/")[-1].split(".")[-1] in x and x not in close]
    names = close or sorted(known)
    return f"{'The nearest names are' if close else 'There are'} {', '.join(map(repr, names[:8]))}."
