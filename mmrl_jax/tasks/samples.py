"""Parses a record of a data set, which is a mapping from columns to values.

    {"file_name": "a/0.png", "prompt": "How many?", "answer": "two", "level": 3}
    {"images": ["a/0.png"], "prompt": [{"role": "user", "content": "How many?"}], "answer": "two"}
    {"image": {"bytes": b"...", "path": null}, "messages": [..., {"role": "assistant", ...}]}

The first is a line of Hugging Face's imagefolder, the second one of TRL's data sets with images,
and the third a row of parquet as the hub stores it, with a whole conversation.
"""

from collections.abc import Mapping, Sequence
import json
from typing import Any, NamedTuple

import numpy as np

from mmrl_jax.data import files
from mmrl_jax.data.images import ImageInfo
from mmrl_jax.tasks.reward_signatures import RESERVED

MAX_REPR = 80  # Maximum number of characters of a value in an error message.
IMAGES, PROMPTS, ANSWERS = ("file_name", "image", "images"), ("prompt", "messages"), ("answer",)
# What a column can be renamed to.
NAMES = ("image", "prompt", "answer")
COMPLETION_REMEDY = "If 'completion' is the answer, set dataset.columns={'answer': 'completion'}."

Message = dict[str, Any]


class Sample(NamedTuple):
    """A parsed record.

    Attributes:
      image: Path of the image, encoded image, or pixels.
      prompt: Text of the prompt, not empty.
      answer: Text of the reference answer, not empty.
      columns: Further columns of the record, without image data.
      messages: The prompt as messages without image data, if it is written so; None otherwise.
    """

    image: str | bytes | np.ndarray
    prompt: str
    answer: str
    columns: dict[str, Any]
    messages: tuple[Message, ...] | None


class Inspected(NamedTuple):
    """What is known of a record that can be used.

    Attributes:
      image: Properties of its image.
      digest: Digest of image, prompt and answer, in 32 hexadecimal digits.
    """

    image: ImageInfo
    digest: str


def inspected(image: ImageInfo, sample: Sample) -> Inspected:
    """Returns what is known of a record, from the properties of its image and its texts."""
    return Inspected(image, files.digest(image.digest, sample.prompt, sample.answer))


def read_sample(record: Mapping[str, Any], names: Mapping[str, str]) -> Sample:
    """Parses a record. A column without a value, None, counts as absent.

    The image is in 'file_name', 'image' or 'images', a path, encoded bytes, or a mapping with one
    of these as 'path' or 'bytes', as the hub stores images. The prompt is a text in 'prompt', or
    messages there or in 'messages': one of a user, which one of the system may precede. The
    system's text then comes first in the prompt, followed by an empty line. The answer is in
    'answer', or the message of an assistant is the last one. An answer that is a list or mapping,
    such as a box, becomes JSON; a list of one message of an assistant, TRL's completion, its text.

    Every other column is a further one, except for those with image data or the name of an argument
    of every call.

    Args:
      record: Values by the names of the columns.
      names: Names of the columns of 'image', 'prompt' and 'answer', where they differ. The latter
        two are further columns too, so that reward functions find them by their own names, unless
        these are the names of arguments of every call.

    Raises:
      ValueError: If the record cannot be used; the message gives the column and its value.
    """
    present = {name: value for name, value in record.items() if value is not None}

    def only(kind: str, usual: Sequence[str]) -> tuple[str, Any]:
        usual = (names[kind],) if kind in names else usual
        found = [name for name in usual if name in present]
        if len(found) > 1:
            raise ValueError(f"The record has {found}, of which only one may have a value.")
        # Of several without a value, a message names one that the record has.
        name = next((x for x in (*found, *usual) if x in record), usual[0])
        return name, present.get(name)

    prompt_name, prompt = only("prompt", PROMPTS)
    messages, answer, part = None, None, None
    if isinstance(prompt, (list, tuple)) and all(isinstance(x, Mapping) for x in prompt):
        prompt, answer, part, messages = _conversation(prompt)
    answer_name, value = only("answer", ANSWERS)
    if answer is not None and value is not None:
        raise ValueError(
            f"The record has an answer in {answer_name!r} and a message of an assistant; leave one."
        )
    if _is_completion(value):
        value, _ = _content(value[0])
    if isinstance(value, (list, tuple, Mapping)) and value:
        value = json.dumps(value, allow_nan=False, ensure_ascii=False)
    image_name, image = only("image", IMAGES)
    used = {*IMAGES, image_name, "prompt", "answer"}
    used |= {x for x in (prompt_name, answer_name) if x in (*PROMPTS, *RESERVED)}
    return Sample(
        _image(image_name, image, part, list(record)),
        _text(prompt_name, prompt, list(record)),
        _text(answer_name, value if answer is None else answer, list(record)),
        {name: x for name, x in record.items() if name not in used and not _has_data(x)},
        messages,
    )


def _conversation(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[str, str | None, Any, tuple[Message, ...]]:
    """Returns the prompt, the answer if there is one, the image in a message, and the prompt again.

    The prompt is returned as a text and as messages.
    """
    roles = [message.get("role") for message in messages]
    contents = [_content(message) for message in messages]
    answer = None
    if roles[-1:] == ["assistant"]:
        answer = contents[-1][0]
        messages, roles, contents = messages[:-1], roles[:-1], contents[:-1]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"Its messages have the roles {short_repr(roles)} before the answer; a prompt is one "
            "message of a user, which one of the system may precede. Split other conversations."
        )
    images = [image for _, part in contents for image in part]
    if len(images) > 1:
        raise ValueError(f"Its messages have {len(images)} images; a prompt has one.")
    plain = tuple(
        {"role": role, "content": _without_data(message["content"])}
        for role, message in zip(roles, messages, strict=True)
    )
    return "\n\n".join(text for text, _ in contents), answer, next(iter(images), None), plain


def _is_completion(value: Any) -> bool:
    """Returns whether a value is a completion of TRL's, a list of one message of an assistant."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 1
        and isinstance(value[0], Mapping)
        and value[0].get("role") == "assistant"
    )


def _has_data(value: Any) -> bool:
    """Returns whether a value is, or has in it, encoded data such as an image rather than text."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or any(map(_has_data, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_data, value))
    if not isinstance(value, bytes):
        return False
    try:
        value.decode("utf-8")  # TFDS has texts as bytes.
    except UnicodeDecodeError:
        return True
    return False


def _content(message: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Returns the text of a message and its images, each of which may be None, a mark alone."""
    content = message.get("content")
    if isinstance(content, str):
        return content, []
    texts, images = [], []
    for part in content if isinstance(content, (list, tuple)) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and not any(map(str.strip, texts)):
            images.append(next((part[k] for k in ("image", "path") if part.get(k)), None))
        elif kind == "image":
            raise ValueError("An image comes after text in a message; models get it before.")
        else:
            raise ValueError(f"A message has the part {short_repr(part)}, not a text or an image.")
    if not texts:
        raise ValueError(f"A message has the content {short_repr(content)}, which has no text.")
    return "".join(texts), images


def _without_data(content: Any) -> Any:
    """Returns the content of a message without the image data of its parts."""
    if isinstance(content, str):
        return content
    keys = {"text": ("type", "text"), "image": ("type",)}
    return [{key: part[key] for key in keys[part["type"]]} for part in content]


def _image(name: str, value: Any, part: Any, present: Sequence[str]) -> str | bytes | np.ndarray:
    """Returns the image of a column, or else that in a message."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise ValueError(f"{name} has {len(value)} images; a prompt has one.")
        value = value[0]
    if value is not None and part is not None:
        raise ValueError(f"The record has an image in {name!r} and one in a message; leave one.")
    value = part if value is None else value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray) or (isinstance(value, (str, bytes)) and value):
        return value
    raise ValueError(f"{name}={short_repr(value)} is not an image.{_hint(name, present)}")


def _text(name: str, value: Any, present: Sequence[str]) -> str:
    """Returns a value as text, which may be a str, UTF-8 bytes as in TFDS, or a number."""
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    # Python's JSON parser accepts NaN, with which exported tables mark missing values.
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, (float, np.floating)) and np.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        unnamed = name in ANSWERS and "completion" in present
        remedy = f" {COMPLETION_REMEDY}" if unnamed else ""
        raise ValueError(
            f"{name}={short_repr(value)} is not a non-empty text.{_hint(name, present)}{remedy}"
        )
    return value.strip()


def _hint(name: str, present: Sequence[str]) -> str:
    return "" if name in present else f" The record has only {short_repr(present)}."


def short_repr(value: Any) -> str:
    """Returns the repr of a value for an error message, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_REPR else f"{text[:MAX_REPR]}..."
