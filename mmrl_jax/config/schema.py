"""Completes a config with defaults, checks its keys, and describes them for `--help`."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import math
import textwrap
from typing import Any, TypeAlias

import ml_collections

from mmrl_jax.config.options import Group, Option

ConfigDict = ml_collections.ConfigDict
ConfigLike: TypeAlias = Mapping[str, Any] | ml_collections.ConfigDict
# A key that a config lacks -> the configs that have it, to complete a sentence; or None.
Elsewhere: TypeAlias = Callable[[str], str | None]
# Range of 32-bit numbers. On the device a larger int would wrap and a larger float be infinite.
_LARGEST_INT, _LARGEST_FLOAT, _SMALLEST_FLOAT = 2**32 - 1, 3.4e38, 1.2e-38


def flatten(config: ConfigLike) -> dict[str, Any]:
    """Returns the values by dotted names, `{"ppo.clip": 0.2, ...}`; an empty group is `{}`."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: ConfigLike) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if is_group(value) and len(value):
                visit(f"{name}.", value)
            else:
                flat[name] = value.to_dict() if hasattr(value, "to_dict") else value

    visit("", config)
    return flat


def flatten_group(group: Group, prefix: str = "") -> dict[str, Option]:
    """Returns the options of a group by dotted names, `{"ppo.clip": Option(...), ...}`."""
    flat: dict[str, Option] = {}
    for key, entry in group.items():
        if isinstance(entry, Option):
            flat[f"{prefix}{key}"] = entry
        else:
            flat.update(flatten_group(entry, f"{prefix}{key}."))
    return flat


def complete(differences: ConfigLike, group: Group) -> ml_collections.ConfigDict:
    """Returns a config with all keys of a group.

    Keys that the group does not have are kept, so that `check` reports them. An option without a
    default that is not set becomes None.

    Args:
      differences: Values that differ from the defaults.
      group: Keys of the config.
    """
    config = ml_collections.ConfigDict()
    for key, entry in group.items():
        value = differences.get(key, dataclasses.MISSING)
        if isinstance(entry, Option):
            config[key] = _typed(entry, value)
        elif value is dataclasses.MISSING or is_group(value):
            config[key] = complete({} if value is dataclasses.MISSING else value, entry)
        else:
            config[key] = value
    for key in differences:
        if key not in group:
            config[key] = differences[key]
    return config


def merge(*configs: ConfigLike) -> dict[str, Any]:
    """Merges nested dictionaries; a later one overrides single keys of earlier ones."""
    merged: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            if is_group(value):
                before = merged.get(key)
                merged[key] = merge(before if is_group(before) else {}, value)
            else:
                merged[key] = value
    return merged


def _typed(option: Option, value: Any) -> Any:
    """Returns the value or else the default; for None a placeholder with the option's type."""
    value = option.default if value is dataclasses.MISSING else value
    if value is dataclasses.MISSING or value is None:
        kinds = [kind for kind in option.kind if kind is not type(None)]
        return ml_collections.config_dict.placeholder(kinds[0] if len(kinds) == 1 else object)
    return ml_collections.ConfigDict(value) if isinstance(value, dict) else value


def check(
    config: ConfigLike,
    group: Group,
    *,
    renamed: Mapping[str, str] | None = None,
    elsewhere: Elsewhere = lambda key: None,
) -> None:
    """Checks a complete config against its keys, and reports all errors at once.

    Args:
      config: Config to check.
      group: Keys that the config must have.
      renamed: Description of the new key by the key of an earlier version.
      elsewhere: See `unknown_key_message`.

    Raises:
      ValueError: If the config is invalid. The message has one line for each unknown key (see
        `unknown_key_message`), missing key, wrong type and invalid value, with the field, the
        value and the remedy.
    """
    known, old = list(flatten_group(group)), renamed or {}
    errors: list[str] = []

    def unknown(name: str, value: Any) -> None:
        names = [f"{name}.{key}" for key in flatten(value)] if is_group(value) else []
        for each in [name] if name in old or not any(n in old for n in names) else names:
            errors.append(unknown_key_message(each, known, renamed=old, elsewhere=elsewhere))

    def visit(prefix: str, node: ConfigLike, table: Group) -> None:
        for key in node:
            if key not in table:
                unknown(f"{prefix}{key}", node[key])
        for key, entry in table.items():
            name = f"{prefix}{key}"
            if key not in node:
                help = entry.help if isinstance(entry, Option) else "a group of keys"
                errors.append(f"Config key '{name}' is missing: add it to the config ({help}).")
            elif isinstance(entry, Option):
                error = _error(name, node[key], entry)
                if error:
                    errors.append(error)
            elif is_group(node[key]):
                visit(f"{name}.", node[key], entry)
            else:
                errors.append(
                    f"Config key '{name}' is {node[key]!r}, but must be a group with the keys "
                    f"{', '.join(entry)}."
                )

    visit("", config, group)
    if errors:
        raise ValueError("\n".join(errors))


def describe(group: Group, values: ConfigLike, remarks: Mapping[str, str]) -> str:
    """Returns name, help, type, valid values and value of each key as text for `--help`.

    The help of all keys is aligned in one column and wrapped at 100 characters.

    Args:
      group: Keys to describe.
      values: Config whose values are shown.
      remarks: Sentences that are added to the help of some keys, by the name of the key.
    """
    options = flatten_group(group)
    flat_values = flatten(values)
    column = 2 + max(map(len, options), default=0)
    lines = []
    for name, option in options.items():
        details = [kind_name(option)]
        if option.valid is not None:
            details.append(option.valid.requirement)
        if dict in option.kind:  # Its keys are not options, but have values of their own.
            start = f"{name}."
            value = {
                k.removeprefix(start): x for k, x in flat_values.items() if k.startswith(start)
            }
        else:
            value = flat_values[name]
        details.append(f"value: {value!r}")
        text = " ".join(filter(None, (option.help, remarks.get(name))))
        lines += textwrap.wrap(
            f"{name.ljust(column)}{text} ({'; '.join(details)})",
            width=100,
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def nearest(name: str, candidates: Iterable[str], *, least: float = 0.0) -> str | None:
    """Returns the candidate with the most similar spelling; None if there is none.

    Dotted names are compared as a whole and by their last part, so that `clip` finds `ppo.clip`.

    Args:
      name: Name to compare.
      candidates: Names to choose from.
      least: Similarity in [0, 1] that the candidate must have.
    """

    def similarity(candidate: str) -> float:
        full = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(
            None, name.rpartition(".")[2], candidate.rpartition(".")[2]
        ).ratio()
        return max(full, 0.95 * last)

    best = max(sorted(candidates), key=similarity, default=None)
    return best if best is not None and similarity(best) >= least else None


def unknown_key_message(
    key: str,
    known: Iterable[str],
    *,
    renamed: Mapping[str, str] | None = None,
    elsewhere: Elsewhere = lambda key: None,
) -> str:
    """Returns the message for an unknown key.

    Args:
      key: The key.
      known: The keys that the config may have.
      renamed: For keys of earlier versions, what they are called now.
      elsewhere: Returns which other configs have the key, to complete a sentence that begins with
        it; None where no other has it, and the nearest known key is named.
    """
    if renamed and key in renamed:
        return f"Config key '{key}' of an earlier version is now {renamed[key]}."
    place = elsewhere(key)
    if place is not None:
        return f"Unknown config key '{key}', which {place}."
    names = list(known)
    if "." not in key:  # The key may be a misspelled group.
        names += [name.partition(".")[0] for name in names]
    guess = nearest(key, names, least=0.6)
    hint = f" Did you mean '{guess}'?" if guess is not None else ""
    return f"Unknown config key '{key}'.{hint}"


def is_group(value: Any) -> bool:
    """Returns whether a value of a config is a group of keys."""
    kinds = (Mapping, ml_collections.ConfigDict, ml_collections.FrozenConfigDict)
    return isinstance(value, kinds)


def kind_name(option: Option) -> str:
    """Returns the types of an option for messages, for example 'int or None'."""
    return " or ".join("None" if kind is type(None) else kind.__name__ for kind in option.kind)


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
        return is_group(value)
    return isinstance(value, kind)


def _fits(value: Any) -> bool:
    """Returns False for a number outside of the 32-bit range; the option's test rejects NaN."""
    if isinstance(value, float):
        return math.isnan(value) or not value or _SMALLEST_FLOAT < abs(value) <= _LARGEST_FLOAT
    return not isinstance(value, int) or abs(value) <= _LARGEST_INT


def _error(name: str, value: Any, option: Option) -> str | None:
    if value is None and option.default is dataclasses.MISSING:
        return f"Config key '{name}' is not set: give it a value ({option.help})"
    if not any(_has_kind(value, kind) for kind in option.kind):
        return (
            f"Config key '{name}' is {value!r} ({type(value).__name__}), but must be "
            f"{kind_name(option)}: {option.help}"
        )
    if not _fits(value):
        return (
            f"Config key '{name}' is {value!r}, but must be in the range of 32-bit numbers: "
            f"{option.help}"
        )
    if value is not None and option.valid is not None and not option.valid.test(value):
        or_none = ", or None" if type(None) in option.kind else ""
        return (
            f"Config key '{name}' is {value!r}, but must be {option.valid.requirement}{or_none}: "
            f"{option.help}"
        )
    return None
