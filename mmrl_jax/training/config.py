"""Configs: checked before anything compiles, compared, written as JSON.

A config is an `ml_collections.ConfigDict` made by `get_config()` in a file of `configs/`. The
command line changes single fields (`--config.ppo.clip=0.1`). This module makes every mistake in
that an error that names the field, its value and the remedy, before the first compile:

    validate_overrides(argv)           a misspelt key on the command line
    check_config(config, schema)       unknown and missing keys, wrong types, impossible values

Nothing here knows what the fields mean: the schema comes from the factory.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import pathlib
import re
import textwrap
import traceback
import types
from typing import Any, TypeAlias

import ml_collections

ConfigDict = ml_collections.ConfigDict
ConfigLike: TypeAlias = Mapping[str, Any] | ml_collections.ConfigDict
_ANYTHING = "anything"
# What 32 bits hold: on the device a larger int would wrap, a larger float be infinite.
_LARGEST_INT, _LARGEST_FLOAT, _SMALLEST_FLOAT = 2**32 - 1, 3.4e38, 1.2e-38


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a schema.

    Attributes:
        kind: The type or types allowed. `float` also takes an int (never a bool), `tuple` also
            takes a list, `dict` takes any group of keys; add `type(None)` for an optional field.
        check: Predicate on the value; called only where the type is right and the value not None.
        requirement: What `check` demands, to complete "must be ...", for example "in (0, 1)".
        meaning: What the field does, with its unit.
    """

    kind: type | tuple[type, ...]
    check: Callable[[Any], bool]
    requirement: str
    meaning: str


Schema = Mapping[str, "Field | Schema"]


def positive(kind: type | tuple[type, ...], meaning: str) -> Field:
    """Returns a field whose number is finite and greater than 0."""
    return Field(
        kind, lambda x: math.isfinite(x) and x > 0, _or_none(kind, "greater than 0"), meaning
    )


def non_negative(kind: type | tuple[type, ...], meaning: str) -> Field:
    """Returns a field whose number is finite and at least 0."""
    return Field(kind, lambda x: math.isfinite(x) and x >= 0, _or_none(kind, "at least 0"), meaning)


def texts(meaning: str) -> Field:
    """Returns a field that takes a tuple of texts."""
    return Field(tuple, lambda x: all(isinstance(t, str) for t in x), "texts alone", meaning)


def pattern(kind: type | tuple[type, ...], meaning: str) -> Field:
    """Returns a field that takes a regular expression."""
    return Field(kind, _is_pattern, _or_none(kind, "a regular expression"), meaning)


def between(
    kind: type | tuple[type, ...], low: float, high: float, meaning: str, *, closed: bool = True
) -> Field:
    """Returns a field whose number lies in [low, high], or in (low, high) if not `closed`."""
    if closed:
        return Field(kind, lambda x: low <= x <= high, f"in [{low}, {high}]", meaning)
    return Field(kind, lambda x: low < x < high, f"in ({low}, {high})", meaning)


def one_of(choices: Collection[str | int], meaning: str) -> Field:
    """Returns a field that takes one of the named values."""
    kinds = tuple(sorted({type(choice) for choice in choices}, key=lambda kind: kind.__name__))
    listed = ", ".join(repr(choice) for choice in choices)
    return Field(kinds, lambda x: x in choices, f"one of {listed}", meaning)


def anything(kind: type | tuple[type, ...], meaning: str) -> Field:
    """Returns a field of which only the type is checked."""
    return Field(kind, lambda x: True, _ANYTHING, meaning)


def _or_none(kind: type | tuple[type, ...], requirement: str) -> str:
    optional = isinstance(kind, tuple) and type(None) in kind
    return f"{requirement}, or None" if optional else requirement


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def flatten(config: ConfigLike) -> dict[str, Any]:
    """Returns `{"ppo.clip": 0.2, ...}`; an empty group appears as `{"group": {}}`."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: ConfigLike) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if _is_group(value) and len(value):
                visit(f"{name}.", value)
            else:
                flat[name] = value.to_dict() if isinstance(value, _CONFIG_DICT) else value

    visit("", config)
    return flat


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate nearest in spelling; None where there are none.

    Dotted names are compared whole and by their last part, so that `clip` finds `ppo.clip`.
    """

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(
            None, name.rpartition(".")[2], candidate.rpartition(".")[2]
        ).ratio()
        return max(whole, 0.95 * last)

    return max(sorted(candidates), key=likeness, default=None)


def unknown_key_message(key: str, known: Iterable[str]) -> str:
    """Returns the message for an unknown key, with the nearest known one."""
    guess = nearest(key, known)
    hint = f" Did you mean '{guess}'?" if guess is not None else ""
    return f"Unknown config key '{key}'.{hint}"


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Loads `configs/name.py` or `configs/name.py:argument` as `config_flags` does.

    Raises:
        ValueError: See `load_module`; or an argument is given to a `get_config` that takes none,
            or is missing for one that needs it.
    """
    path, _, argument = spec.partition(":")
    get_config = load_module(pathlib.Path(path)).get_config
    arguments = (argument,) if argument else ()
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        remedy = f"give '{path}' alone" if argument else f"give '{path}:ARGUMENT'"
        raise ValueError(
            f"Config file '{spec}' does not fit its get_config() ({error}): {remedy}."
        ) from error
    return get_config(*arguments)


def load_module(path: pathlib.Path) -> types.ModuleType:
    """Executes a config file.

    Raises:
        ValueError: No such file (names the nearest one beside it), no `get_config` in it, or it
            cannot be executed (names the line).
    """
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        guess = nearest(str(path), beside)
        hint = f" Did you mean '{guess}'?" if guess is not None else ""
        raise ValueError(f"No config file '{path}'.{hint}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"Config file '{path}' is not a Python file: give one that ends in .py.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"Config file '{path}' cannot be executed: {describe_failure(error)}."
        ) from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"Config file '{path}' has no get_config(): add one.")
    return module


def describe_failure(error: Exception) -> str:
    """Returns the error of executing a user's module in one line, with the file and the line."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # The frames of the import system itself say nothing about the user's file.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != importlib.__file__
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{text}{place}"


def validate_overrides(
    argv: Sequence[str],
    reference: ConfigLike | None = None,
    *,
    flag: str = "config",
    elsewhere: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Checks `--config.a.b=value` arguments; call it before absl parses its flags.

    absl's own error for a misspelt key names neither the key's path nor its neighbors, and comes
    with a stack of frames.

    Args:
        argv: Command line, with or without the program's name.
        reference: Config that has every valid key. None: the one that `--config=FILE` in `argv`
            names; without such an argument nothing is checked.
        flag: Name of the config flag.
        elsewhere: Keys that only some configs have, and which these are.

    Raises:
        ValueError: One line for each unknown key with the nearest valid one, or for a group that
            is given a value.
    """
    if "--" in argv:
        argv = argv[: list(argv).index("--")]
    if reference is None:
        path = _flag_value(argv, flag)
        if path is None:
            return
        reference = load_config(path)
    known = flatten(reference)
    groups = _group_names(known)
    errors = []
    for argument in argv:
        key = _override_key(argument, flag)
        if key is None or key in known:
            continue
        if key in groups:
            inside = sorted(name for name in known if name.startswith(f"{key}."))
            errors.append(
                f"Config key '{key}' is a group and takes no value. Set one of its fields: "
                f"{', '.join(inside)}."
            )
        elif key in elsewhere:
            errors.append(
                f"Config key '{key}' is of configs with {elsewhere[key]}, and would not be read "
                "here: leave it out."
            )
        else:
            errors.append(unknown_key_message(key, known))
    if errors:
        raise ValueError("\n".join(errors))


def check_config(config: ConfigLike, schema: Schema) -> None:
    """Checks a whole config against a schema, and reports all mistakes at once.

    Args:
        config: The config.
        schema: Nested mapping from key to `Field`, or to another mapping for a group.

    Raises:
        ValueError: One line for each unknown key (with the nearest valid one), missing key,
            wrong type and impossible value, each with the field, the value and the remedy.
    """
    known = list(_flatten_schema(schema))
    errors: list[str] = []

    def visit(prefix: str, node: ConfigLike, table: Schema) -> None:
        for key in node:
            if key not in table:
                errors.append(unknown_key_message(f"{prefix}{key}", known))
        for key, entry in table.items():
            name = f"{prefix}{key}"
            if key not in node:
                what = entry.meaning if isinstance(entry, Field) else "a group of fields"
                errors.append(f"Config key '{name}' is missing ({what}): add it to the config.")
            elif isinstance(entry, Field):
                error = _field_error(name, node[key], entry)
                if error:
                    errors.append(error)
            elif _is_group(node[key]):
                visit(f"{name}.", node[key], entry)
            else:
                errors.append(
                    f"Config key '{name}' is {node[key]!r}, but must be a group with the fields "
                    f"{', '.join(entry)}."
                )

    visit("", config, schema)
    if errors:
        raise ValueError("\n".join(errors))


def describe_schema(schema: Schema) -> str:
    """Returns name, meaning, type and allowed values of each field, for `--help`.

    The meanings start in one column, and go on there in further lines: 100 columns in all.
    """
    fields = _flatten_schema(schema)
    column = 2 + max(map(len, fields), default=0)
    lines = []
    for name, field in fields.items():
        demands = [_kind_name(field.kind)]
        if field.requirement != _ANYTHING:
            demands.append(field.requirement)
        lines += textwrap.wrap(
            f"{name.ljust(column)}{field.meaning} ({', '.join(demands)})",
            width=100,
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def to_json(config: ConfigLike) -> str:
    """Returns the config as sorted, indented JSON; tuples become lists.

    Raises:
        ValueError: A value that JSON cannot hold, with its key.
    """
    for key, value in flatten(config).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"Config key '{key}' holds {value!r}, which JSON cannot: use numbers, strings, "
                "booleans, None, tuples and groups."
            ) from error
    plain = ml_collections.ConfigDict(config).to_dict()
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Returns the locked config of `to_json`; lists come back as tuples.

    Raises:
        ValueError: The text is not a JSON object.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Not a config in JSON ({error}): restore it or delete it.") from error
    if not isinstance(plain, dict):
        raise ValueError(f"A config in JSON must be an object, not {type(plain).__name__}.")
    config = ml_collections.ConfigDict(_lists_to_tuples(plain))
    config.lock()
    return config


def diff_configs(first: ConfigLike, second: ConfigLike) -> dict[str, tuple[Any, Any]]:
    """Returns `{"ppo.clip": (0.2, 0.1)}` for each key that differs, sorted by key.

    A key that one side lacks has the string "(absent)" there. Values are compared as JSON gives
    them back, so a tuple equals the list that it became on disk, and NaN equals NaN.
    """
    flat_first = flatten(from_json(to_json(first)))
    flat_second = flatten(from_json(to_json(second)))
    differences = {}
    for key in sorted(flat_first.keys() | flat_second.keys()):
        one = flat_first.get(key, "(absent)")
        two = flat_second.get(key, "(absent)")
        # repr tells 1 from True and 1.0, and equates NaN with NaN.
        if repr(one) != repr(two):
            differences[key] = (one, two)
    return differences


_CONFIG_DICT = (ml_collections.ConfigDict, ml_collections.FrozenConfigDict)


def _is_group(value: Any) -> bool:
    return isinstance(value, (Mapping, *_CONFIG_DICT))


def _group_names(flat: Iterable[str]) -> set[str]:
    groups: set[str] = set()
    for name in flat:
        parts = name.split(".")
        groups.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return groups


def _flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Returns the value of `--flag=value`, `-flag=value` or `--flag value`; the last one wins."""
    value = None
    for i, argument in enumerate(argv):
        name, equals, text = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            if equals:
                value = text
            elif i + 1 < len(argv):
                value = argv[i + 1]
    return value


def _override_key(argument: str, flag: str) -> str | None:
    """Returns `a.b` of `--config.a.b=1` or, for booleans, of `--noconfig.a.b`; else None."""
    name = argument.partition("=")[0]
    for start in (f"--{flag}.", f"-{flag}.", f"--no{flag}.", f"-no{flag}."):
        if name.startswith(start):
            return name[len(start) :]
    return None


def _flatten_schema(schema: Schema, prefix: str = "") -> dict[str, Field]:
    flat: dict[str, Field] = {}
    for key, entry in schema.items():
        if isinstance(entry, Field):
            flat[f"{prefix}{key}"] = entry
        else:
            flat.update(_flatten_schema(entry, f"{prefix}{key}."))
    return flat


def _kind_name(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("None" if one is type(None) else one.__name__ for one in kinds)


def _has_kind(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind is dict:
        return _is_group(value)
    return isinstance(value, kind)


def _fits(value: Any) -> bool:
    """Whether a value is no number, or one that 32 bits hold; NaN is left to the field's check."""
    if isinstance(value, float):
        return math.isnan(value) or not value or _SMALLEST_FLOAT < abs(value) <= _LARGEST_FLOAT
    return not isinstance(value, int) or abs(value) <= _LARGEST_INT


def _field_error(name: str, value: Any, field: Field) -> str | None:
    kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
    if not any(_has_kind(value, kind) for kind in kinds):
        return (
            f"Config key '{name}' is {value!r} ({type(value).__name__}), but must be "
            f"{_kind_name(field.kind)}: {field.meaning}."
        )
    if not _fits(value):
        return (
            f"Config key '{name}' is {value!r}, but must be a number that 32 bits can hold: "
            f"{field.meaning}."
        )
    if value is not None and not field.check(value):
        return (
            f"Config key '{name}' is {value!r}, but must be {field.requirement}: {field.meaning}."
        )
    return None


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
