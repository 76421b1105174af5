"""Strict JSON, and a subset of JSON Schema.

Sources: RFC 8259; JSON Schema, draft 2020-12, whose keywords have their meaning there.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

ANNOTATIONS = ("$schema", "$id", "title", "description", "default", "examples")
BOUNDS = {
    "minimum": lambda x, bound: x >= bound,
    "maximum": lambda x, bound: x <= bound,
    "exclusiveMinimum": lambda x, bound: x > bound,
    "exclusiveMaximum": lambda x, bound: x < bound,
}
# Type whose size is bounded, by keyword.
SIZES: dict[str, type] = {"minLength": str, "maxLength": str, "minItems": list, "maxItems": list}
KEYWORDS = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
    *BOUNDS,
    *SIZES,
    *ANNOTATIONS,
)
TYPES = {
    "object": lambda x: isinstance(x, dict),
    "array": lambda x: isinstance(x, list),
    "string": lambda x: isinstance(x, str),
    "boolean": lambda x: isinstance(x, bool),
    "null": lambda x: x is None,
    "number": lambda x: _is_number(x),
    "integer": lambda x: _is_number(x) and x == math.floor(x),  # 1.0 is an integer.
}


def read_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
      ValueError: If it is not JSON, an object has the same key twice, or a number is not finite.
      RecursionError: If it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("An object has the same key twice.")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is not finite.")
        return float(text)

    # Python reads NaN and Infinity, which are no JSON, as constants.
    return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)


def read_schema(schema: Any) -> Any:
    """Returns a schema, given as a mapping or as JSON, after a check of its keywords.

    Raises:
      ValueError: If it is invalid, or has a keyword that is not in `KEYWORDS`.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"schema={schema!r} is not JSON ({error}); correct it.") from error
    _check(schema, "schema")
    return schema


def _check(schema: Any, path: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{path}={schema!r} is not an object such as {{'type': 'object'}}.")
    for key, value in schema.items():
        if key not in KEYWORDS:
            raise ValueError(f"{path} has {key!r}; only {', '.join(KEYWORDS)} are supported.")
        here = f"{path}[{key!r}]"
        if key == "type":
            # A value of JSON may have no hash.
            unknown = [x for x in _listed(value) if x not in tuple(TYPES)]
            if unknown:
                raise ValueError(f"{here} has {unknown}; give some of {', '.join(TYPES)}.")
        elif key == "properties":
            if not isinstance(value, Mapping):
                raise ValueError(f"{here}={value!r} is not an object of schemas.")
            for name, part in value.items():
                _check(part, f"{here}[{name!r}]")
        elif key in ("additionalProperties", "items"):
            _check(value, here)
        elif key in ("enum", "required") and not isinstance(value, (list, tuple)):
            raise ValueError(f"{here}={value!r} is not a list.")
        elif key in (*BOUNDS, *SIZES) and not _is_number(value):
            raise ValueError(f"{here}={value!r} is not a number.")


def fits(value: Any, schema: Any) -> bool:
    """Returns whether a value of `read_json` fits a schema of `read_schema`."""
    if isinstance(schema, bool):
        return schema
    if "type" in schema and not any(TYPES[x](value) for x in _listed(schema["type"])):
        return False
    if "enum" in schema and not any(_equal(value, x) for x in schema["enum"]):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if _is_number(value):
        return all(test(value, schema[key]) for key, test in BOUNDS.items() if key in schema)
    for key, kind in SIZES.items():
        if key in schema and isinstance(value, (str, list)) and isinstance(value, kind):
            size = len(value)
            if size < schema[key] if key.startswith("min") else size > schema[key]:
                return False
    if isinstance(value, list):
        return all(fits(x, schema.get("items", True)) for x in value)
    if isinstance(value, dict):
        if any(name not in value for name in schema.get("required", ())):
            return False
        parts, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(fits(x, parts.get(name, others)) for name, x in value.items())
    return True


def _listed(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(a: Any, b: Any) -> bool:
    """Returns whether two values of JSON are equal; unlike in Python, 1 and true are not."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b
