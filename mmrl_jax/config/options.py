"""Hyperparameters as fields of dataclasses, which define type, default, valid values and help.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class PPO:
        discount: float = option(0.99, "Discount factor per control step.", between(0, 1))
        target_kl: float | None = option(None, "Stops an update early above this KL.", POSITIVE)

`options_of(PPO)` returns these options. The keys of a config, their checks, their defaults, the
output of `--help`, and the arguments of the algorithm are all derived from the fields.
"""

from collections.abc import Callable, Collection
import dataclasses
import math
import re
import types
import typing
from typing import Any, Literal, NamedTuple

Kind = tuple[type, ...]


class Valid(NamedTuple):
    """A condition on the values of an option, in addition to their type.

    Attributes:
      test: Returns whether a value is valid. The value has the type of the option and is not None.
      requirement: Description of the valid values, which completes the sentence "must be ...".
    """

    test: Callable[[Any], bool]
    requirement: str


class Option(NamedTuple):
    """One key of a config.

    Attributes:
      kind: Types that a value may have. `float` also allows an int (but no bool), `tuple` also
        allows a list, and `dict` allows any group of keys.
      default: Value of the key in a config that does not set it; `dataclasses.MISSING` if every
        config must set it.
      valid: Further condition on values; None if all values of these types are valid.
      help: Description of the option in one sentence, with its unit.
    """

    kind: Kind
    default: Any
    valid: Valid | None
    help: str


POSITIVE = Valid(lambda x: math.isfinite(x) and x > 0, "greater than 0")
NON_NEGATIVE = Valid(lambda x: math.isfinite(x) and x >= 0, "at least 0")
POSITIVE_FRACTION = Valid(lambda x: 0 < x <= 1, "in (0, 1]")
BELOW_ONE = Valid(lambda x: 0 <= x < 1, "in [0, 1)")
PATTERN = Valid(lambda x: _compiles(x), "a regular expression")
NON_EMPTY = Valid(lambda x: len(x) > 0, "not empty")
TEXTS = Valid(lambda x: all(isinstance(text, str) for text in x), "a tuple of strings")


def between(low: float, high: float) -> Valid:
    """Returns the condition that a value is in the closed interval [low, high]."""
    return Valid(lambda x: low <= x <= high, f"in [{low}, {high}]")


def at_least(low: int, reason: str = "") -> Valid:
    """Returns the condition that a value is at least `low`, with a reason for the error message."""
    return Valid(lambda x: x >= low, f"at least {low}{reason and f', {reason}'}")


def one_of(choices: Collection[str | int]) -> Valid:
    """Returns the condition that a value is one of `choices`."""
    return Valid(lambda x: x in choices, f"one of {', '.join(map(repr, choices))}")


def option(default: Any, help: str, valid: Valid | None = None) -> Any:
    """Returns a dataclass field that becomes a key of a config.

    Args:
      default: Value of the key in a config that does not set it; `dataclasses.MISSING` if every
        config must set it.
      help: Description of the option in one sentence, with its unit.
      valid: Further condition on values; None if all values of the annotated type are valid. The
        choices of a `Literal` annotation are checked without it.
    """
    metadata = {"help": help, "valid": valid}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(kind: type) -> Any:
    """Returns a dataclass field that becomes a group of keys, the options of another dataclass."""
    return dataclasses.field(default_factory=kind)


Group = typing.Mapping[str, "Option | Group"]


def options_of(*kinds: type) -> dict[str, Option | Group]:
    """Returns the options of dataclasses by their names.

    Args:
      *kinds: Dataclasses with fields made by `option` and `group`. Other fields are not keys of a
        config and are ignored.

    Returns:
      An option for each field, or a group for a field whose type is a dataclass.

    Raises:
      TypeError: If two of the dataclasses have an option of the same name.
    """
    options: dict[str, Option | Group] = {}
    for kind in kinds:
        annotations = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            annotation = annotations[field.name]
            entry: Option | Group
            if dataclasses.is_dataclass(annotation):
                entry = options_of(typing.cast(type, annotation))
            elif "help" in field.metadata:
                entry = _option(annotation, field)
            else:
                continue
            if field.name in options:
                raise TypeError(f"{kind.__name__}.{field.name} is an option of another class too.")
            options[field.name] = entry
    return options


def build(kind: type, values: typing.Mapping[str, Any], **overrides: Any) -> Any:
    """Returns an instance of a dataclass with the values of a group of a config.

    Args:
      kind: Dataclass with fields made by `option` and `group`.
      values: Group of the config. Keys that are not fields of the dataclass are ignored.
      **overrides: Values of fields that are not read from the group.
    """
    annotations = typing.get_type_hints(kind)
    arguments = dict(overrides)
    for field in dataclasses.fields(kind):
        is_key = "help" in field.metadata or dataclasses.is_dataclass(annotations[field.name])
        if field.name in overrides or not is_key:
            continue
        annotation = annotations[field.name]
        value = values[field.name]
        if dataclasses.is_dataclass(annotation):
            value = build(typing.cast(type, annotation), value)
        elif hasattr(value, "to_dict"):
            value = value.to_dict()
        arguments[field.name] = value
    return kind(**arguments)


def _option(annotation: Any, field: dataclasses.Field) -> Option:
    valid, default = field.metadata["valid"], field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    alternatives = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    kinds: list[type] = []
    for alternative in alternatives:
        if typing.get_origin(alternative) is Literal:
            choices = typing.get_args(alternative)
            valid = valid or one_of(choices)
            kinds += sorted({type(choice) for choice in choices}, key=lambda kind: kind.__name__)
        else:
            kinds.append(typing.get_origin(alternative) or alternative)
    return Option(tuple(kinds), default, valid, field.metadata["help"])


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
