"""Prompts with images and their completions, as tokens of a pretrained language model.

    prompt        <|im_start|> user <image> <image> how many red circles ? <|im_end|> ... assistant
    completion    two <|im_end|>

The chat template is the model's own; image tokens come before the text of the prompt.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import re
from typing import Any, NamedTuple

from mmrl_jax.pretrained import bundled_weights, hub_repository, processor_files
from mmrl_jax.tasks.samples import short_repr

SMOLLM2 = "smollm2"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# A prompt and a completion that locate where a template inserts them, and a second pair that tests
# whether it alters them: they contain quotes, a line break, and characters that HTML or templates
# escape.
_TURN, _REPLY = "<turn>", "<reply>"
_OTHER_TURN = "Is \"a\" < 'b' & {{ c }}?\nOr  \\n, \u00e9?"
_OTHER_REPLY = 'It\'s "c" > &d; {% e %},\nor  \\t, \u00fc.'
# Date that templates receive. Llama 3's templates use it when they have no clock.
_TODAY = datetime.datetime(2024, 7, 26)
_UNPADDED = ("-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j")


class Template(NamedTuple):
    """Text that a chat template writes around a prompt and its completion.

    Attributes:
      before: Text before the user's message.
      after: Text between the user's message and the completion.
      lead: White space that the template writes at the start of a completion.
      stops: Token ids that end a completion. The first one ends completions in training data.
    """

    before: str
    after: str
    lead: str
    stops: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """Tokenizes prompts and completions, and decodes completions.

    Attributes:
      tokenizer: Tokenizer of transformers.
      template: Text around prompts and completions, see `Template`.
      image: Token id of an image token.
      vocabulary: Number of rows of the model's embedding table; text may only have ids below it.
    """

    tokenizer: Any
    template: Template
    image: int
    vocabulary: int

    def __post_init__(self) -> None:
        """Raises ValueError if the stop token, which is also the padding, has no row."""
        check_ids(self.tokenizer, [self.stop], self.vocabulary, "the end of a completion")

    @property
    def stop(self) -> int:
        """Token id that ends completions in training data."""
        return self.template.stops[0]

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end a completion."""
        return self.template.stops

    def encode_prompt(self, text: str, *, images: int) -> list[int]:
        """Returns the token ids of a prompt with an image.

        Args:
          text: Text of the prompt.
          images: Number of image tokens.

        Raises:
          ValueError: The text is invalid, see `check_text` and `check_ids`.
        """
        check_text(text, "prompt")
        before = self._ids(self.template.before)
        after = self._ids(text + self.template.after)
        check_ids(self.tokenizer, [*before, *after], self.vocabulary, f"prompt {short_repr(text)}")
        return [*before, *[self.image] * images, *after]

    def encode_completion(self, text: str) -> list[int]:
        """Returns the token ids of a completion, with the stop token; raises as `encode_prompt`."""
        check_text(text, "answer")
        # Some tokenizers begin every text with a space, so the completion is tokenized after its
        # prompt.
        prompt = self._ids(self.template.after)
        ids = self._ids(self.template.after + self.template.lead + text)
        if ids[: len(prompt)] != prompt:
            prompt, ids = [], self._ids(self.template.lead + text)
        ids = [*ids[len(prompt) :], self.stop]
        check_ids(self.tokenizer, ids, self.vocabulary, f"answer {short_repr(text)}")
        return ids

    @property
    def pad(self) -> int:
        """Token id of padding, which equals `stop`; a mask distinguishes the two."""
        return self.stop

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids before the first stop token, without the template's lead.

        Tokens that are not text stay visible, so that different completions decode to different
        text: special tokens and image tokens as the tokenizer writes them, and each id that it does
        not know as U+FFFD.
        """
        ids = list(itertools.takewhile(lambda x: x not in self.stops, map(int, tokens)))
        text = "".join(
            self.tokenizer.decode(list(run), skip_special_tokens=False)
            if known
            else UNKNOWN * len(list(run))
            for known, run in itertools.groupby(ids, self._known)
        )
        return text.removeprefix(self.template.lead)

    def _known(self, token: int) -> bool:
        # A model may have more token ids than its tokenizer.
        return self.tokenizer.convert_ids_to_tokens(token) is not None

    def rendered(self) -> dict[str, Any]:
        """Returns data for JSON that identifies how all prompts and completions are tokenized.

        Two models are trained on the same tokens only if this is equal: it has the rendered
        template and the ids that the tokenizer gives to a sample prompt, including an image mark,
        and to a sample completion.
        """
        prompt = f"{self.template.before}{_OTHER_TURN}{self.template.after}"
        ids = self._ids(prompt), self._ids(self.template.lead + _OTHER_REPLY)
        return json.loads(json.dumps(self.template._asdict() | {"ids": ids}))

    def _ids(self, text: str) -> list[int]:
        # The template includes what the tokenizer would add around a text.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def directory_of(pretrained: str) -> pathlib.Path:
    """Returns the directory of a model, in the hub's format.

    Args:
      pretrained: 'smollm2', a directory, or hf://owner/name of a model on the hub, which is
        downloaded.

    Raises:
      ValueError: The packages with SmolLM2's weights are not installed, the directory does not
        exist, or the model cannot be downloaded.
    """
    if pretrained.startswith(hub_repository.SCHEME):
        return hub_repository.pull(pretrained.removeprefix(hub_repository.SCHEME))
    if pretrained != SMOLLM2:
        directory = pathlib.Path(pretrained)
        if not directory.is_dir():
            hint = (
                f" To download the model from the hub, give {hub_repository.SCHEME}{pretrained}."
                if re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained)
                else ""
            )
            raise ValueError(f"There is no directory {pretrained!r}.{hint}")
        return directory
    try:
        return bundled_weights.smollm2()
    except ImportError as error:
        raise ValueError(f"model.checkpoint={SMOLLM2!r}: {error}") from error


@functools.lru_cache(maxsize=4)  # A run builds its task several times.
def read_chat(directory: pathlib.Path, vocabulary: int) -> ChatTokenizer:
    """Reads tokenizer and chat template of a local directory in the hub's format.

    The id of the image token is the size of the vocabulary, which no text token has.

    Args:
      directory: Directory of a model that was trained to chat.
      vocabulary: Number of rows of the model's embedding table.

    Raises:
      ValueError: There is no tokenizer, or its template is not supported, see `read_template`.
    """
    tokenizer = processor_files.read_tokenizer(directory)
    template = read_template(tokenizer, directory, with_image=False)
    return ChatTokenizer(tokenizer, template, vocabulary, vocabulary)


def read_template(tokenizer: Any, directory: pathlib.Path, *, with_image: bool) -> Template:
    """Reads a chat template.

    The output of a template must not depend on the date, or a resumed run would train on different
    prompts. A template that asks for the date therefore always gets the same one.

    Args:
      tokenizer: Tokenizer of transformers.
      directory: Directory from which the tokenizer was read, for error messages.
      with_image: Whether the user's message has an image before its text, whose mark is then part
        of `Template.before`.

    Raises:
      ValueError: There is no chat template or no token that ends a text; or the template cannot
        render a prompt and a completion, or it alters, repeats or drops one of them.
    """
    for name in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"The tokenizer of {directory} has no {name}: give a model that was trained to "
                "chat, such as an 'Instruct' model."
            )
    render = functools.partial(_render, tokenizer, directory, with_image)
    prompt, conversation = render(_TURN), render(_TURN, _REPLY)
    for text, probes in ((prompt, [_TURN]), (conversation, [_TURN, _REPLY])):
        for probe in probes:
            if text.count(probe) != 1:
                raise _not_verbatim(directory, probe, text)
    if render(_OTHER_TURN) != prompt.replace(_TURN, _OTHER_TURN):
        raise _not_verbatim(directory, _OTHER_TURN, render(_OTHER_TURN))
    other = render(_OTHER_TURN, _OTHER_REPLY)
    if other != conversation.replace(_TURN, _OTHER_TURN).replace(_REPLY, _OTHER_REPLY):
        raise _not_verbatim(directory, _OTHER_REPLY, other)
    before, _, after = prompt.partition(_TURN)
    before_reply, _, after_reply = conversation.partition(_REPLY)
    lead = before_reply.removeprefix(prompt)
    # The token that ends a turn may differ from the one that ends a text, e.g.
    # "<end_of_utterance>".
    ends = tokenizer(after_reply, add_special_tokens=False)["input_ids"][:1]
    known = tokenizer.added_tokens_decoder
    stop = ends[0] if ends and ends[0] in known and known[ends[0]].special else None
    return Template(
        before,
        after,
        lead if lead.isspace() else "",
        stop_tokens(tokenizer, directory, *([] if stop is None else [stop])),
    )


def stop_tokens(tokenizer: Any, directory: str | pathlib.Path, *first: int) -> tuple[int, ...]:
    """Returns the token ids that end a completion.

    These are the given ids, the tokenizer's end of text, and the ids of generation_config.json.

    Args:
      tokenizer: Tokenizer of transformers.
      directory: Directory of the model.
      *first: Token ids that come first in the result.

    Raises:
      ValueError: The file generation_config.json cannot be read, or has values that are not ids.
    """
    path, listed = pathlib.Path(directory) / "generation_config.json", []
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); restore or delete it.") from error
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in listed):
        raise ValueError(
            f"{path} has eos_token_id={listed!r}, which must be an id, or a list of ids."
        )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*first, *own, *listed]))


def check_text(text: str, where: str) -> None:
    """Checks that a text can be encoded.

    Args:
      text: Text of a prompt or a completion.
      where: Description of the text for the error message.

    Raises:
      ValueError: The text has a lone surrogate, as may occur in JSON or file names.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} {short_repr(text)} has {ascii(text[error.start])}, a lone surrogate, at "
            f"character {error.start}, which is not valid text; replace it. It is often half of a "
            "truncated emoji."
        ) from error


def check_ids(tokenizer: Any, ids: Iterable[int], vocabulary: int, where: str) -> None:
    """Checks that a model has rows for all token ids.

    Inside `jit`, an index without a row is clamped or reads as NaN, without an error.

    Args:
      tokenizer: Tokenizer of transformers that produced the ids.
      ids: Token ids of a text.
      vocabulary: Number of rows of the model's embedding table.
      where: Description of the text for the error message.

    Raises:
      ValueError: An id is negative, or at least `vocabulary`.
    """
    beyond = sorted({int(i) for i in ids if not 0 <= i < vocabulary})
    if beyond:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in beyond[:3])
        raise ValueError(
            f"{where} has token {named}, but the model's table has {vocabulary} rows: tokens were "
            "added to the tokenizer only. Add rows for them to the model with transformers' "
            "resize_token_embeddings and train them, or remove the tokens from the text."
        )


def _render(
    tokenizer: Any, directory: pathlib.Path, with_image: bool, turn: str, reply: str | None = None
) -> str:
    """Renders a prompt up to the start of the completion, or with a reply the full conversation."""

    def content(text: str, *images: dict[str, str]) -> Any:
        return [*images, {"type": "text", "text": text}] if with_image else text

    messages = [{"role": "user", "content": content(turn, {"type": "image"})}]
    if reply is not None:
        messages.append({"role": "assistant", "content": content(reply)})
    try:
        template = tokenizer.get_chat_template()
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=_without_clock(template),
                tokenize=False,
                add_generation_prompt=reply is None,
            )
        )
    except Exception as error:  # A template is a program that may raise any exception.
        raise ValueError(
            f"The chat template of {directory} cannot render {messages}: {type(error).__name__}: "
            f"{error}. Give a model whose template accepts a single user turn."
        ) from error


def _without_clock(template: str) -> str:
    """Returns the template with a `strftime_now`, if it uses one, that has a fixed date."""
    if "strftime_now" not in template:
        return template
    text = "format"
    for directive in (*"aAbBcdDeFfGHIjmMpRSTuUVwWxXyY", *_UNPADDED):
        text += f" | replace('%{directive}', '{_TODAY.strftime('%' + directive)}')"
    # A definition in the template takes precedence over that of transformers. The trailing line
    # break belongs to the macro, as in transformers' Jinja settings, so that the template still
    # begins at the start of a line.
    return "{%- macro strftime_now(format) -%}{{ " + text + " }}{%- endmacro %}\n" + template


def _not_verbatim(directory: pathlib.Path, probe: str, text: str) -> ValueError:
    return ValueError(
        f"The chat template of {directory} must write each text once and unaltered, but from "
        f"{probe!r} it made {text!r}. Correct the template (chat_template.jinja), or give a model "
        "with a suitable one."
    )
