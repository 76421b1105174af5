"""Boxes, points and polygons in texts."""

from collections.abc import Sequence
import re
from typing import Any, NamedTuple

from mmrl_jax.rewards.schemas import read_json

_COORDINATE = r"\s*([+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
_KEYS = re.compile(r"\"(?:bbox_2d|point_2d)\"")


class Point(NamedTuple):
    """A point."""

    x: float
    y: float


class Box(NamedTuple):
    """A box with sides parallel to the axes and an area above 0."""

    x1: float
    y1: float
    x2: float
    y2: float


def read_box(text: str) -> Box | None:
    """Returns the only box [x1, y1, x2, y2] in a text; None if there is no valid one, or another.

    A valid box has 0 <= x1 < x2 and 0 <= y1 < y2.
    """
    numbers = _only_numbers(text, 4)
    return None if numbers is None else _valid(Box(*numbers))


def read_reference_box(text: str) -> Box | None:
    """Returns the valid box of a reference answer, or None.

    It is JSON, whose numbers may have exponents and any number of digits, or a text as for
    `read_box`.
    """
    numbers = _floats(_json(text), 4)
    return read_box(text) if numbers is None else _valid(Box(*numbers))


def read_point(text: str) -> Point | None:
    """Returns the only point (x, y) in a text; None if there is no valid one, or another number."""
    numbers = _only_numbers(text, 2)
    return None if numbers is None else Point(*numbers)


def read_region(text: str) -> Box | tuple[Point, ...]:
    """Returns the box or the corners of the polygon in a JSON text.

    Raises:
      ValueError: If it is neither a valid box nor a polygon of at least three points.
    """
    box = read_reference_box(text)
    if box is not None:
        return box
    value = _json(text)
    pairs = [_floats(x, 2) for x in value] if isinstance(value, list) else []
    corners = tuple(Point(*pair) for pair in pairs if pair is not None)
    if len(corners) < 3 or len(corners) < len(pairs):
        raise ValueError(
            f"answer={text!r} is neither a box [x1, y1, x2, y2] with x1 < x2 and y1 < y2, nor a "
            "polygon [[x, y], ...] of at least three corners; correct the record."
        )
    return corners


def iou(a: Box, b: Box) -> float:
    """Returns the intersection over union of two boxes, in [0, 1]."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0.0) * max(height, 0.0)
    areas = ((x.x2 - x.x1) * (x.y2 - x.y1) for x in (a, b))
    return shared / (sum(areas) - shared)


def contains(region: Box | Sequence[Point], point: Point) -> bool:
    """Returns whether a point is in a box with its border, or in a polygon by the even-odd rule."""
    x, y = point
    if isinstance(region, Box):
        return region.x1 <= x <= region.x2 and region.y1 <= y <= region.y2
    inside = False
    for a, b in zip(region, [*region[1:], region[0]], strict=True):
        # The edge crosses the horizontal line through the point, to the right of it.
        if (a.y > y) != (b.y > y) and x < a.x + (y - a.y) / (b.y - a.y) * (b.x - a.x):
            inside = not inside
    return inside


def _valid(box: Box) -> Box | None:
    return box if 0 <= box.x1 < box.x2 and 0 <= box.y1 < box.y2 else None


def _json(text: str) -> Any:
    """Returns the value of a JSON text with finite numbers; None if it is none."""
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        return None


def _floats(value: Any, count: int) -> tuple[float, ...] | None:
    """Returns a list of `count` numbers as floats; None if the value is none."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in value):
        return None
    try:
        return tuple(map(float, value))
    except OverflowError:
        return None


def _only_numbers(text: str, count: int) -> tuple[float, ...] | None:
    """Returns the numbers in the only brackets with `count` numbers; None if there are others."""
    numbers = ",".join([_COORDINATE] * count)
    found = re.findall(rf"\[{numbers}\]|\({numbers}\)", text)
    rest = re.sub(rf"\[{numbers}\]|\({numbers}\)", "", _KEYS.sub("", text))
    if len(found) != 1 or any(c.isnumeric() for c in rest):
        return None
    # One of the two alternatives matched; the groups of the other are empty.
    return tuple(float(x) for x in found[0] if x)
