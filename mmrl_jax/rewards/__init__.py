r"""Reward functions for common kinds of answers, which a config names as 'mmrl_jax.rewards:number'.

    rewards.functions=("mmrl_jax.rewards:number", "mmrl_jax.rewards:length_bounds")
    rewards.options=({"tolerance": 0.5}, {"max_length": 200})

A policy finds every completion that a reward function accepts by mistake. These functions therefore
accept the few forms that their docstrings name, and return 0 for everything else: a right answer in
another form costs some samples, a wrong one that is rewarded costs the run. Every function returns
a number in [0, 1] for every completion; it raises ValueError for a bad reference answer or option.
A column of a record replaces the option of the same name, unless its value is None.

Answers are read from the final part of a completion:

- Nothing is accepted of a completion that was truncated.
- Reasoning in one `<think>...</think>` at the beginning is removed. Its opening tag may be missing,
  because some chat templates write it into the prompt. A missing, second or later tag: 0.
- Of one `<answer>...</answer>` or one `\boxed{...}` the content counts, and two of them: 0.
  A sign or an operator other than = before a `\boxed{...}`: 0.
- An answer that is empty or longer than 10,000 characters: 0.
"""

from collections.abc import Mapping, Sequence
import decimal
import math
import re
from typing import Any, Literal

from mmrl_jax.rewards import geometry, schemas
from mmrl_jax.rewards.parsing import final_answer, normalize, read_number, single_number

# Characters that show nothing: white space, control and formatting characters, and fillers.
_BLANK = (
    r"\x00-\x20\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U000e0000-\U000e0fff"
)
_NO_TAG = r"(?!</?think>|</?answer>)"
_CONTENT = rf"[{_BLANK}]*{_NO_TAG}[^{_BLANK}](?:{_NO_TAG}.)*"
# One block of reasoning and one answer, without any of the four tags in either.
THINK_ANSWER = rf"\s*<think>{_CONTENT}</think>\s*<answer>{_CONTENT}</answer>\s*"
_LEAD = (
    r"(?:(?:the|my) )?(?:(?:correct|right|final|best) )?"
    r"(?:(?:answer|choice|option)(?: is)?(?: ?: ?| ))?(?:option )?"
)
_CHOICE = re.compile(rf"{_LEAD}[(\"'*]*([a-z])(.*)", re.ASCII | re.IGNORECASE)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)```", re.DOTALL)


def exact_match(*, completion: str, answer: str, finished: bool = True, **columns: Any) -> float:
    """Returns 1 if the final answer is the reference answer, else 0.

    Both are compared in lower case, in Unicode's form NFC, with runs of white space as one space,
    and without quotes, asterisks and a period around them. Characters that only look alike differ.
    A reference answer may have reasoning, tags or a box, which are removed as in a completion.

    Raises:
      ValueError: If the reference answer has no final answer.
    """
    right = final_answer(answer, True)
    if right is None:
        raise ValueError(
            f"answer={answer[:100]!r} has no final answer: its tags or boxes are unbalanced or "
            "several, or it is too long; correct the record."
        )
    text = final_answer(completion, finished)
    return float(text is not None and normalize(text) == normalize(right))


def number(
    *,
    completion: str,
    answer: str,
    finished: bool = True,
    tolerance: float = 0.0,
    relative_tolerance: float = 0.0,
    **columns: Any,
) -> float:
    """Returns 1 if the final answer has one number, which is the reference answer, else 0.

    A number has ASCII digits, an optional sign, commas between thousands, a decimal fraction and an
    exponent of up to three digits: 12, -3.5, 1,200, 2e-3. Words around it are allowed. Refused are
    further numbers in any script or in English words ("one", "tenths"), brackets and percent signs;
    a dash, an operator other than = or a single letter before or after it (- 5, 5 / x, 5 k); words
    for an operation, such as minus, not, twice, root, percent; and letters and signs that touch
    it: 5%, 5cm, ~5, 1/2.

    Args:
      completion: Text of the completion.
      answer: Reference answer, a number of this form.
      finished: Whether the completion was not truncated.
      tolerance: Largest accepted absolute difference, at least 0.
      relative_tolerance: Largest accepted difference as a fraction of the reference answer. The
        larger one of the two bounds counts.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the reference answer is not a number, or a tolerance is negative or not finite.
    """
    right = read_number(answer)
    if right is None:
        raise ValueError(f"answer={answer!r} is not a number such as -1,200.5; correct the record.")
    for name, value in (("tolerance", tolerance), ("relative_tolerance", relative_tolerance)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be at least 0 and finite.")
    text = final_answer(completion, finished)
    value = None if text is None else single_number(text)
    if value is None:
        return 0.0
    # The repr of a float is decimal, so that 0.3 is within 0.1 of 0.4.
    bounds = (repr(tolerance), repr(relative_tolerance))
    absolute, relative = (decimal.Decimal(bound) for bound in bounds)
    return float(abs(value - right) <= max(absolute, relative * abs(right)))


def choice(
    *,
    completion: str,
    answer: str,
    finished: bool = True,
    choices: Sequence[str] = (),
    **columns: Any,
) -> float:
    """Returns 1 if the final answer is the letter of the right choice and nothing else, else 0.

    The letter may be lower case, in parentheses, quotes or asterisks, may end with a period or a
    colon, and may follow words such as "The correct answer is" or "Answer:". With `choices`, the
    text of the same choice may follow it: "B. two", "(B) two".

    Args:
      completion: Text of the completion.
      answer: Reference answer, an ASCII letter, which may be in parentheses.
      finished: Whether the completion was not truncated.
      choices: Texts of the choices A, B, C and so on.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the reference answer is not a letter, or not one of the choices.
    """
    right = answer.strip().strip("().").upper()
    if not re.fullmatch("[A-Z]", right) or (choices and ord(right) - ord("A") >= len(choices)):
        of = f" of the {len(choices)} choices" if choices else ""
        raise ValueError(f"answer={answer!r} is not the letter{of}; write A, B, C, ...")
    text = final_answer(completion, finished)
    found = None if text is None else _CHOICE.fullmatch(" ".join(text.split()))
    if found is None or found[1].upper() != right:
        return 0.0
    rest = found[2]
    if not rest.strip(" )\"'*.:"):
        return 1.0
    following = re.fullmatch(r"[\"'*]*[).:][\"'*]* (.+)", rest)
    if not choices or following is None:
        return 0.0
    return float(normalize(following[1]) == normalize(choices[ord(right) - ord("A")]))


def box_iou(
    *,
    completion: str,
    answer: str,
    finished: bool = True,
    threshold: float = 0.5,
    **columns: Any,
) -> float:
    """Returns the intersection over union of two boxes if it is at least `threshold`, else 0.

    The final answer has one box [x1, y1, x2, y2] in brackets or parentheses, with
    0 <= x1 < x2 and 0 <= y1 < y2, in the units of the reference answer. Words around it are
    allowed, further digits are not, except in the key "bbox_2d" that Qwen's models write.

    Args:
      completion: Text of the completion.
      answer: Reference answer, a box [x1, y1, x2, y2] as JSON, or the text of such a box.
      finished: Whether the completion was not truncated.
      threshold: Smallest rewarded intersection over union, in (0, 1]. A low one rewards a box
        around the whole image.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the reference answer is not a box, or the threshold is out of range.
    """
    right = geometry.read_reference_box(answer)
    if right is None:
        raise ValueError(f"answer={answer!r} is not a box [x1, y1, x2, y2]; correct the record.")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1].")
    text = final_answer(completion, finished)
    box = None if text is None else geometry.read_box(text)
    iou = 0.0 if box is None else geometry.iou(box, right)
    return iou if iou >= threshold else 0.0


def point_in_region(
    *, completion: str, answer: str, finished: bool = True, **columns: Any
) -> float:
    """Returns 1 if the final answer is a point in the region of the reference answer, else 0.

    The final answer has one point (x, y) in brackets or parentheses. Words around it are allowed,
    further digits are not, except in the key "point_2d" that Qwen's models write.

    Args:
      completion: Text of the completion.
      answer: Reference answer as JSON: a box [x1, y1, x2, y2], whose border is a part of it, or the
        corners [[x, y], ...] of a polygon, three at least.
      finished: Whether the completion was not truncated.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the reference answer is neither a box nor a polygon.
    """
    region = geometry.read_region(answer)
    text = final_answer(completion, finished)
    point = None if text is None else geometry.read_point(text)
    return float(point is not None and geometry.contains(region, point))


def format_match(
    *, completion: str, finished: bool = True, pattern: str = THINK_ANSWER, **columns: Any
) -> float:
    r"""Returns 1 if a regular expression matches the whole completion, else 0.

    Reasoning is not removed. A dot matches line breaks too; `\d`, `\w` and `\s` match ASCII only.

    Hazard: a pattern with nested repetitions, such as `(a+)+b`, can take forever. The call then
    fails after `rewards.timeout_s`, and its completion is left out of the update.

    Args:
      completion: Text of the completion.
      finished: Whether the completion was not truncated.
      pattern: Regular expression; by default one `<think>...</think>` and then one
        `<answer>...</answer>`, each with a visible character, with no other tag and no other text.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.ASCII | re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"pattern={pattern!r} is not a regular expression ({error}); correct it."
        ) from error
    matches = completion.strip() and compiled.fullmatch(completion)
    return float(finished and bool(matches))


def json_schema(
    *,
    completion: str,
    schema: Mapping[str, Any] | str,
    finished: bool = True,
    **columns: Any,
) -> float:
    """Returns 1 if the final answer is JSON that fits a schema, else 0.

    The final answer is the JSON alone, or one block of it between lines of three backticks. An
    object with the same key twice, NaN, infinite numbers, or text after the JSON: 0.

    Args:
      completion: Text of the completion.
      schema: JSON Schema as a dictionary or as JSON, with the keywords in `schemas.KEYWORDS`.
        Without `"additionalProperties": false`, an object may have any further keys.
      finished: Whether the completion was not truncated.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the schema is invalid or has another keyword.
    """
    checked = schemas.read_schema(schema)
    text = final_answer(completion, finished)
    if text is None:
        return 0.0
    fenced = _FENCE.fullmatch(text)
    try:
        value = schemas.read_json(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return 0.0
    return float(schemas.fits(value, checked))


def length_bounds(
    *,
    completion: str,
    max_length: int,
    finished: bool = True,
    min_length: int = 1,
    unit: Literal["characters", "words"] = "characters",
    **columns: Any,
) -> float:
    """Returns 1 if the length of the completion is in [min_length, max_length], else 0.

    White space at the ends and invisible characters are not counted, a run of white space counts as
    one character, and a word has a letter or a digit. Reasoning counts. What the text says does not
    matter, so that this function needs another one beside it.

    Args:
      completion: Text of the completion.
      max_length: Largest length.
      finished: Whether the completion was not truncated; 0 if it was.
      min_length: Smallest length, at least 1.
      unit: 'characters' or 'words'.
      **columns: Further columns, which are ignored.

    Raises:
      ValueError: If the bounds are not 1 <= min_length <= max_length, or the unit is unknown.
    """
    if not 1 <= min_length <= max_length:
        raise ValueError(
            f"min_length={min_length}, max_length={max_length}: give 1 <= min_length <= max_length."
        )
    words = completion.split()
    if unit == "words":
        length = sum(any(c.isalnum() for c in word) for word in words)
    elif unit == "characters":
        length = sum(c.isprintable() for c in " ".join(words))
    else:
        raise ValueError(f"unit={unit!r} must be 'characters' or 'words'.")
    return float(finished and min_length <= length <= max_length)
