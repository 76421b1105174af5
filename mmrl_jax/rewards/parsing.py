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
        boxed = _BOXED.findall(text)
        if not boxed or text.count("\\boxed") != 1:
            return None
        text = boxed[0]
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
    found = _NUMBER.search(text)
    if found is None:
        return None
    before, after = text[: found.start()], text[found.end() :]
    if any(c.isnumeric() or c in "<>[]{}%" for c in before + after):
        return None
    # A dash or an operator before the number, even with a space between, may change its value.
    last = before.rstrip()[-1:]
    if last and last != "=" and unicodedata.category(last) in ("Pd", "Sm"):
        return None
    return None if _WORDS.search(f"{before} {after}") else read_number(found[1])
