"""The mapping of the fields of a data set to the inputs and targets of a policy.

    {"pixels": "observation/image", "proprio": "observation/state[0:7]",
     "action": ("action/world_vector", "action/gripper")}

A name may end with a slice of its last axis, and several names are concatenated along it.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.data import images as images_lib
from mmrl_jax.data.records import (
    Episode,
    EpisodeSource,
    Feature,
    Invalid,
    InvalidData,
    RawEpisode,
    check,
    nearest,
)

PRIVILEGED = "privileged/"
# Fields without which a data set can be used; they are then 0, or False.
OPTIONAL = ("reward", "is_terminal")
_SLICE = re.compile(r"(?P<name>.*?)(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?")


class Target(NamedTuple):
    """What a policy observes, and what it is trained to predict.

    Attributes:
      pixels: Height and width of the images; None for a policy without images.
      proprio: Number P of proprioceptive readings.
      action_size: Number A of dimensions of an action, or of discrete actions.
      discrete: Whether actions are discrete.
      encode: Function that encodes an instruction as tokens int32 [L], and raises ValueError if it
        cannot; None for a policy without instructions.
      vocabulary: Digest of the instructions that `encode` accepts.
      privileged: Shapes of further targets by name.
    """

    pixels: tuple[int, int] | None
    proprio: int
    action_size: int
    discrete: bool
    encode: Callable[[str], np.ndarray] | None
    vocabulary: str
    privileged: Mapping[str, tuple[int, ...]]

    def fields(self) -> dict[str, Feature]:
        """Returns the fields of an episode by their paths, see `Episode.fields`."""
        action = Feature((), "int32") if self.discrete else Feature((self.action_size,), "float32")
        fields = {"observation/proprio": Feature((self.proprio,), "float32"), "action": action}
        if self.pixels is not None:
            fields["observation/pixels"] = Feature((*self.pixels, 3), "uint8")
        for name, shape in self.privileged.items():
            fields[f"{PRIVILEGED}{name}"] = Feature(shape, "float32")
        fields |= {name: Feature((), "float32") for name in ("reward", "discount")}
        return fields | {
            name: Feature((), "bool") for name in ("is_first", "is_last", "is_terminal")
        }


class Part(NamedTuple):
    """A field of a data set, or a part of its last axis."""

    name: str
    part: slice


def parse_part(text: str) -> Part:
    """Returns the field and the slice in a text, for example 'observation/state[0:7]'."""
    match = _SLICE.fullmatch(text)
    assert match is not None  # Every text has a name, possibly without a slice.
    start, stop = (int(x) if x else None for x in match.group("start", "stop"))
    return Part(match["name"], slice(start, stop))


def part_size(feature: Feature, part: Part) -> int:
    """Returns the number of values that a part of a field has in one step."""
    return len(range(math.prod(size or 1 for size in feature.shape))[part.part])


class FeatureMapping:
    """Makes episodes of a data set those of a policy.

    Attributes:
      wanted: Names of the fields that are read.
      has_reward: Whether the data set has rewards.
      schema: Fields of the episodes that are made.

    Args:
      source: Data set.
      features: Names of the data set by our names 'pixels', 'proprio', 'instruction', 'action',
        'reward', 'is_terminal' and 'privileged/<name>'; a text, or a sequence of texts that are
        concatenated. Those of `source.defaults` need not be given.
      target: Inputs and targets of the policy.
      resize: Method by which images are resized, see `images.fit`.
      key: Name of the option that has `features`, for messages.

    Raises:
      InvalidData: If a field is unknown or missing, or has a size other than the policy's. The
        message names the field and the nearest names.
    """

    def __init__(
        self,
        source: EpisodeSource,
        features: Mapping[str, str | Sequence[str]],
        target: Target,
        *,
        resize: str,
        key: str,
    ):
        self._source, self._target, self._resize, self._key = source, target, resize, key
        self.schema = target.fields()
        needed = ["proprio", "action", *OPTIONAL]
        needed += ["pixels"] if target.pixels is not None else []
        needed += ["instruction"] if target.encode is not None else []
        needed += [f"{PRIVILEGED}{name}" for name in target.privileged]
        for name in features:
            if name not in needed:
                raise InvalidData(
                    f"{key} has {name!r}, which the policy does not use. {nearest(name, needed)}"
                )
        self._parts: dict[str, tuple[Part, ...]] = {}
        for name in needed:
            given = features.get(name, source.defaults.get(name, name))
            names = (given,) if isinstance(given, str) else tuple(given)
            if name in OPTIONAL and name not in features and names[0] not in source.features:
                continue
            self._parts[name] = tuple(self._part(name, text) for text in names)
            self._check_kind(name)
        self.wanted = frozenset(part.name for x in self._parts.values() for part in x)
        self.has_reward = "reward" in self._parts

    def describe(self) -> dict[str, Any]:
        """Returns what determines the episodes that are made, in values that JSON supports."""
        return {
            "parts": {
                name: [(part.name, part.part.start, part.part.stop) for part in parts]
                for name, parts in sorted(self._parts.items())
            },
            "schema": {name: (x.shape, x.dtype) for name, x in sorted(self.schema.items())},
            "resize": self._resize,
            "vocabulary": self._target.vocabulary,
            "action_size": self._target.action_size,
        }

    def _part(self, name: str, text: str) -> Part:
        part = parse_part(text)
        known = list(self._source.features)
        if part.name not in known:
            raise InvalidData(
                f"{name!r} is read from {part.name!r}, which the data set does not have. "
                f"{nearest(part.name, known)} Set {self._key}={{{name!r}: ...}}."
            )
        return part

    def _check_kind(self, name: str) -> None:
        """Raises InvalidData for a field whose declared type or size is not that of the policy."""
        parts = self._parts[name]
        declared = [self._source.features[part.name] for part in parts]
        origin = " and ".join(repr(part.name) for part in parts)
        if name in ("pixels", "instruction"):
            kind = "str" if name == "instruction" else "image"
            valid = declared[0].dtype == kind or (kind == "image" and declared[0].is_image)
            if len(parts) != 1 or not valid:
                raise InvalidData(
                    f"{name!r} is read from {origin} of type {[x.dtype for x in declared]}, but "
                    f"needs one field of type {kind}; set {self._key}={{{name!r}: ...}}."
                )
            return
        if any(x.dtype in ("image", "str") for x in declared):
            raise InvalidData(
                f"{name!r} is read from {origin} of type {[x.dtype for x in declared]}, but needs "
                f"numbers; set {self._key}={{{name!r}: ...}}."
            )
        sizes = []
        for x, part in zip(declared, parts, strict=True):
            if None in x.shape:
                return  # The size is known only when an episode is read.
            sizes.append(part_size(x, part))
        expected = math.prod(self._shape(name))
        if sum(sizes) != expected:
            raise InvalidData(
                f"{name!r} is read from {origin} with {sum(sizes)} numbers, but the environment "
                f"has {expected}; choose some of them, for example "
                f"{self._key}={{{name!r}: '{parts[0].name}[0:{expected}]'}}."
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a field of one step, by our name of the field."""
        path = {"proprio": "observation/proprio"}.get(name, name)
        return tuple(size for size in self.schema[path].shape if size is not None)

    def __call__(self, raw: RawEpisode) -> Episode:
        """Returns an episode in our names, sizes and types.

        Raises:
          Invalid: If a field is missing or has another size, an image cannot be decoded, or the
            episode fails a check, see `records.check`.
        """
        for name in self.wanted - raw.fields.keys():
            raise Invalid("missing field", f"{name!r} is missing; it has {sorted(raw.fields)}.")
        steps = len(raw.fields[self._parts["action"][0].name])
        if steps <= raw.final_observation:
            raise Invalid("empty episode", f"it has {steps} steps and no action.")
        observation = {"proprio": self._numbers(raw, "proprio", steps)}
        if self._target.pixels is not None:
            observation["pixels"] = self._pixels(raw)
        index = np.arange(steps)
        terminal = self._numbers(raw, "is_terminal", steps) > 0
        # The discount belongs to the last action, whose next observation is terminal.
        actions = steps - raw.final_observation
        discount = np.where(terminal.any() & (index >= actions - 1), 0, 1).astype(np.float32)
        episode = Episode(
            observation=observation,
            action=self._action(raw, steps, actions),
            reward=self._numbers(raw, "reward", steps),
            discount=discount,
            is_first=np.asarray(raw.fields.get("is_first", index == 0)),
            is_last=np.asarray(raw.fields.get("is_last", index == steps - 1)),
            is_terminal=terminal,
            language_instruction=self._texts(raw, steps),
            privileged={
                name: self._numbers(raw, f"{PRIVILEGED}{name}", steps)
                for name in self._target.privileged
            },
            final_observation=raw.final_observation,
            provenance=raw.provenance,
        )
        check(episode, self.schema)
        return episode

    def _numbers(self, raw: RawEpisode, name: str, steps: int) -> np.ndarray:
        """Returns a field as float32 [N, ...]; zeros if an optional field is absent."""
        shape = (steps, *self._shape(name))
        if name not in self._parts:
            return np.zeros(shape, np.float32)
        columns = []
        for part in self._parts[name]:
            x = np.asarray(raw.fields[part.name])
            if len(x) != steps or x.dtype.kind not in "fiub":
                raise Invalid(
                    "wrong schema", f"{part.name!r} is {x.dtype} {list(x.shape)} in {steps} steps."
                )
            columns.append(x.reshape(steps, -1)[:, part.part])
        numbers = np.concatenate(columns, axis=1).astype(np.float32)
        if numbers.size != math.prod(shape):
            raise Invalid(
                "wrong schema",
                f"{name!r} has {numbers.shape[1]} numbers, but must have {math.prod(shape[1:])}.",
            )
        return numbers.reshape(shape)

    def _action(self, raw: RawEpisode, steps: int, actions: int) -> np.ndarray:
        if not self._target.discrete:
            return self._numbers(raw, "action", steps)
        numbers = self._numbers(raw, "action", steps)
        taken = numbers[:actions]
        if not np.isfinite(taken).all():
            raise Invalid("non-finite action", f"the actions are {taken}.")
        valid = (taken == np.round(taken)) & (taken >= 0) & (taken < self._target.action_size)
        if not valid.all():
            raise Invalid(
                "wrong schema",
                f"action {taken[~valid][0]} is not an integer in [0, {self._target.action_size}).",
            )
        return np.where(np.arange(steps) < actions, numbers, 0).astype(np.int32)

    def _pixels(self, raw: RawEpisode) -> np.ndarray:
        """Returns decoded and resized images, uint8 [N, H, W, 3]."""
        assert self._target.pixels is not None
        (part,) = self._parts["pixels"]
        declared, frames, sizes = self._source.features[part.name], [], set()
        for step, image in enumerate(raw.fields[part.name]):
            try:
                decoded, info = images_lib.read_rgb(image)
            except Exception as error:  # Image decoders raise exceptions of many types.
                raise Invalid(
                    "damaged image",
                    f"{part.name!r} at step {step} ({type(error).__name__}: {error}).",
                ) from error
            sizes.add((info.height, info.width))
            frames.append(images_lib.fit(decoded, self._target.pixels, resize=self._resize))
        shape = tuple(declared.shape[:2])
        if len(sizes) > 1 or not all(
            None in (a, b) or a == b for size in sizes for a, b in zip(shape, size, strict=False)
        ):
            raise Invalid(
                "mixed image sizes",
                f"{part.name!r} has images of the sizes {sorted(sizes)}, but is declared with "
                f"{shape}.",
            )
        return np.stack(frames)

    def _texts(self, raw: RawEpisode, steps: int) -> list[str]:
        encode = self._target.encode
        if encode is None:
            return [""] * steps
        (part,) = self._parts["instruction"]
        texts = list(raw.fields[part.name])
        for text in dict.fromkeys(texts):
            try:
                encode(text)
            except ValueError as error:
                raise Invalid("unknown instruction", str(error)) from error
        return texts
