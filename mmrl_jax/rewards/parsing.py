"""Reads the final answer of a completion, and the number in it."""

import decimal
import re
import unicodedata

MAX_LENGTH = 10_000  # Maximum number of characters of a final answer.
MAX_DIGITS = 50  # Maximum number of characters of a number.

_THINK, _END = "<think>", "</think>"
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_VALUE = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
# What may touch a number; a period or comma only if no digit follows. Lists of what may are safe
# against characters that look like a sign, a digit or a space.
_NUMBER = re.compile(rf"(?<![^\s:=(\"'*$])(?=[+-]?\.?[0-9])({_VALUE})(?=[.,;:!?)\"'*$]*(?:\s|$))")
_WORDS = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    r"fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
    r"ninety|hundred|thousand|million|billion|trillion|dozen|half|third|quarter)s?\b",
    re.IGNORECASE,
)
# Words that change the value of a number beside them; ordinal numbers may be fractions.
_OPERATIONS = re.compile(
    r"\b(?:minus|negative|plus|not|times|divided|multiplied|power|factorial|squared|cubed|twice|"
    r"thrice|double|triple|pairs?|roots?|sqrt|cbrt|log|exp|percent|percentage|pct|per\s+(?:cent|mille)|"
    r"halves|mn|bn|mio|mrd|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|"
    r"thousand|llion)ths?)\b",
    re.IGNORECASE,
)
# Markdown's emphasis, with the same number of asterisks on both sides.
_EMPHASIS = re.compile(r"(\*{1,3})(?=[^\s*])([^*]*[^\s*])\1")
# Emphasis and arrows, which may stand before a box.
_NO_SIGNS = re.compile(r"\*|[-=]+>|[\u2190-\u21ff\u27f0-\u27ff]")
_SIGNED_DOLLARS = re.compile(r"(?<=[+-])\$(?=[.0-9])")


def final_answer(completion: str, finished: bool) -> str | None:
    """Returns the answer of a completion without its reasoning, see `mmrl_jax.rewards`.

    Returns None if the completion was truncated, or has no or more than one answer.
    """
    text = completion
    if not finished:
        return None
    if _THINK in text or _END in text:
        reasoning, _, text = text.partition(_END)
        opened = reasoning.lstrip().removeprefix(_THINK)
        # Without an end, nothing is left.
        if _THINK in opened or _THINK in text or _END in text:
            return None
    if "<answer>" in text or "</answer>" in text:
        if text.count("<answer>") != 1 or text.count("</answer>") != 1:
            return None
        text, end, _ = text.partition("<answer>")[2].partition("</answer>")
        if not end:
            return None
    if "\\boxed" in text:
        boxed = _BOXED.search(text)
        if boxed is None or text.count("\\boxed") != 1:
            return None
        # The box of -\boxed{5} does not have the answer.
        if _operates(_neighbor(_NO_SIGNS.sub("", text[: boxed.start()])[::-1])):
            return None
        text = boxed[1]
    text = text.strip()
    return text if 0 < len(text) <= MAX_LENGTH else None


def normalize(text: str) -> str:
    """Returns a text in lower case, in Unicode's form NFC, and without decoration at its ends."""
    plain = " ".join(unicodedata.normalize("NFC", text).lower().split())
    decoration = " \"'`*"
    bare = plain.strip(decoration).removesuffix(".").strip(decoration)
    return bare or plain  # An answer such as '*' is decoration only.


def read_number(text: str) -> decimal.Decimal | None:
    """Returns the number that a text is, see `mmrl_jax.rewards.number`; None if it is none."""
    text = text.strip()
    if len(text) > MAX_DIGITS or not re.fullmatch(rf"(?=[+-]?\.?[0-9]){_VALUE}", text):
        return None
    return decimal.Decimal(text.replace(",", ""))


def single_number(text: str) -> decimal.Decimal | None:
    """Returns the only number in a text; None if there is none, or something that may be another.

    Args:
      text: Final answer of a completion.
    """
    text = _SIGNED_DOLLARS.sub("", _EMPHASIS.sub(r"\2", text))
    found = _NUMBER.search(text)
    if found is None:
        return None
    before, after = _visible(text[: found.start()]), _visible(text[found.end() :])
    if any(c.isnumeric() or c in "<>[]{}%\u2030\u2031\u066a*\\" for c in before + after):
        return None
    # An operator before or after the number, even with a space between, may change its value.
    if _operates(_neighbor(before[::-1])) or _operates(_neighbor(after)):
        return None
    if re.search(r"!\s*=\s*$", before) or _is_factor(before[::-1]) or _is_factor(after):
        return None
    rest = f"{before} {after}"
    return None if _WORDS.search(rest) or _OPERATIONS.search(rest) else read_number(found[1])


def _visible(text: str) -> str:
    """Returns a text without marks and formatting characters, which nobody sees between others."""
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn", "Me"))


def _operates(character: str) -> bool:
    """Returns whether a character is a sign or an operator other than =."""
    if not character or character in "=`":
        return False
    # Among them are the heavy signs of emojis.
    signs = "^/*\u00b7\u2795\u2796\u2797\u2716"
    return character in signs or unicodedata.category(character) in ("Pd", "Sm", "Sk")


def _neighbor(text: str) -> str:
    """Returns the first letter, digit or operator of a text; '' if there is none."""
    return next((c for c in text if c.isalnum() or _operates(c)), "")


def _is_factor(text: str) -> bool:
    """Returns whether a text begins with a single letter, such as the k of '5 k'.

    A colon or = between is no product, 'A: 5', nor is the word 'I' or 'a', or the s of "it's".
    """
    found = re.match(r"[^\w:=]*([^\W\d_])(?!\w|['\u2019]\w)", text)
    return found is not None and found[1] not in "aAI"
