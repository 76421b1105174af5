"""Hyperparameters as fields of dataclasses: type, default, valid values and help in one place.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class PPO:
        discount: float = option(0.99, "Discount factor per control step.", between(0, 1))
        target_kl: float | None = option(None, "Stops an update early above this KL.", POSITIVE)

`schema.options_of(PPO)` reads them back. The keys of a config, their checks, their defaults, the
output of `--help`, and the dataclass that the algorithm is given are all derived from these fields.
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
    """The values that an option may take, beyond their type.

    Attributes:
      test: Predicate on a value that has the option's type and is not None.
      requirement: What `test` demands, to complete the sentence "must be ...".
    """

    test: Callable[[Any], bool]
    requirement: str


class Option(NamedTuple):
    """One key of a config.

    Attributes:
      kind: The types that a value may have. `float` also admits an int (never a bool), `tuple` also
        admits a list, and `dict` admits any group of keys.
      default: The value of a config that does not set the key; `dataclasses.MISSING` if every
        config must set it.
      valid: The values that are allowed among those of the right type; None for all of them.
      help: What the option does, in one sentence with its unit.
    """

    kind: Kind
    default: Any
    valid: Valid | None
    help: str


POSITIVE = Valid(lambda x: math.isfinite(x) and x > 0, "greater than 0")
NON_NEGATIVE = Valid(lambda x: math.isfinite(x) and x >= 0, "at least 0")
PATTERN = Valid(lambda x: _compiles(x), "a regular expression")
NON_EMPTY = Valid(lambda x: len(x) > 0, "not empty")
TEXTS = Valid(lambda x: all(isinstance(text, str) for text in x), "strings alone")


def between(low: float, high: float) -> Valid:
    """Returns the values in the closed interval [low, high]."""
    return Valid(lambda x: low <= x <= high, f"in [{low}, {high}]")


def at_least(low: int, reason: str = "") -> Valid:
    """Returns the values that are no less than `low`, with the reason that an error gives."""
    return Valid(lambda x: x >= low, f"at least {low}{reason and f', {reason}'}")


def one_of(choices: Collection[str | int]) -> Valid:
    """Returns the named values."""
    return Valid(lambda x: x in choices, f"one of {', '.join(map(repr, choices))}")


def option(default: Any, help: str, valid: Valid | None = None) -> Any:
    """Returns a dataclass field that is a key of a config.

    Args:
      default: The value of a config that does not set the key; `dataclasses.MISSING` if every
        config must set it.
      help: What the option does, in one sentence with its unit.
      valid: The values that are allowed among those of the annotated type; by default all of them.
        The values of a `Literal` annotation need not be repeated here.
    """
    metadata = {"help": help, "valid": valid}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(kind: type) -> Any:
    """Returns a dataclass field that is a group of keys, with the options of another dataclass."""
    return dataclasses.field(default_factory=kind)


Group = typing.Mapping[str, "Option | Group"]


def options_of(*kinds: type) -> dict[str, Option | Group]:
    """Returns the options of dataclasses by their names; a field of a dataclass type is a group.

    Args:
      *kinds: Dataclasses whose fields were made by `option` and `group`. Fields of other origins
        are not keys of a config, and are left out.

    Raises:
      TypeError: Two of the dataclasses have an option of the same name.
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


def build(kind: type, values: typing.Mapping[str, Any], **given: Any) -> Any:
    """Returns an instance of a dataclass with the values of a group of a config.

    Args:
      kind: Dataclass with fields made by `option` and `group`.
      values: The group; keys that are no fields of the dataclass are not read.
      **given: The fields that are not keys of a config.
    """
    annotations = typing.get_type_hints(kind)
    arguments = dict(given)
    for field in dataclasses.fields(kind):
        is_key = "help" in field.metadata or dataclasses.is_dataclass(annotations[field.name])
        if field.name in given or not is_key:
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
