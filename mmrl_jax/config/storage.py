"""Conversion of configs to and from JSON, and the differences between two configs."""

import json
from typing import Any

import ml_collections

from mmrl_jax.config.schema import ConfigLike, flatten


def to_json(config: ConfigLike) -> str:
    """Returns the config as sorted, indented JSON; tuples become lists.

    Raises:
        ValueError: If a value is not JSON-serializable; the message gives its key.
    """
    for key, value in flatten(config).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"Config key '{key}' is {value!r}, which is not JSON-serializable: use numbers, "
                "strings, booleans, None, tuples and groups."
            ) from error
    plain = ml_collections.ConfigDict(config).to_dict()
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Returns a locked config from the text of `to_json`; lists become tuples.

    Raises:
        ValueError: If the text is not a JSON object.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The config is not valid JSON ({error}): restore it or delete it."
        ) from error
    if not isinstance(plain, dict):
        raise ValueError(f"A config in JSON must be an object, not {type(plain).__name__}.")
    config = ml_collections.ConfigDict(_lists_to_tuples(plain))
    config.lock()
    return config


def diff_configs(first: ConfigLike, second: ConfigLike) -> dict[str, tuple[Any, Any]]:
    """Returns the differing values of two configs by key, for example `{"ppo.clip": (0.2, 0.1)}`.

    A key that is missing on one side has the string "(absent)" there. Values are compared after
    conversion to JSON and back, so that a tuple equals a list, and NaN equals NaN.
    """
    flat_first = flatten(from_json(to_json(first)))
    flat_second = flatten(from_json(to_json(second)))
    differences = {}
    for key in sorted(flat_first.keys() | flat_second.keys()):
        one = flat_first.get(key, "(absent)")
        two = flat_second.get(key, "(absent)")
        # Unlike ==, repr distinguishes 1 from True and 1.0, and is equal for two NaN.
        if repr(one) != repr(two):
            differences[key] = (one, two)
    return differences


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
