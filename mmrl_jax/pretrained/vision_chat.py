"""Questions about a picture and their answers, as a pretrained vision-language model reads them.

    prompt    <|im_start|> User : <image> ... <image> how many ? <end_of_utterance> Assistant :
    answer    two <end_of_utterance>

Template, tokens and pictures are those of the model's own processor; pictures inside `jit`.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.qwen_vision import PatchImages
from mmrl_jax.models.tiles import AnyresTiles, Tiles
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained import hub, processing, qwen_processing
from mmrl_jax.pretrained.chat import (
    ChatTokenizer,
    Template,
    check_ids,
    check_text,
    read_template,
    stop_tokens,
)
from mmrl_jax.pretrained.families import qwen_vl
from mmrl_jax.tasks.folder import short_repr

FAMILIES = (*processing.FAMILIES, *qwen_vl.DECODERS)
# Trained on a picture and words, without a template.
PLAIN = ("paligemma",)


@dataclasses.dataclass(frozen=True, eq=False)
class VisionChatTokenizer(ChatTokenizer):
    """How a model is asked about a picture, and answers; see `ChatTokenizer`.

    Attributes:
      read: a text with the mark of a picture to ids, with a token for each of its features.
    """

    read: Callable[[str], list[int]]

    def prompt(self, question: str, *, images: int) -> list[int]:
        """The ids of a question about a picture of `images` image tokens.

        Raises:
          ValueError: the processor gives the picture another number of them, or the question has
            the mark of a picture in it; or see `check_text` and `check_ids`.
        """
        check_text(question, "prompt")
        ids = self.read(self.template.before + question + self.template.after)
        found = ids.count(self.image)
        if found != images:
            raise ValueError(f"{found} image tokens, but the picture has {images} features.")
        # Features take the place of image tokens, which need no rows.
        words = [token for token in ids if token != self.image]
        check_ids(self.tokenizer, words, self.vocabulary, f"prompt {short_repr(question)}")
        return ids


class VLMSpec(NamedTuple):
    """A model that reads questions about pictures of one size, without its parameters.

    Attributes:
      model: the module.
      chat: its texts.
      image_tokens: of a picture, one for each feature of the vision model.
      pictures: uint8 [B, H, W, 3] to what its vision model takes, a pure function.
      positions: of tokens int32 [B, S] of which bool [B, S] are present, int32 [B, A, S] on the A
        axes of its rotary embedding; None where they are counted.
    """

    model: VisionLanguageModel
    chat: VisionChatTokenizer
    image_tokens: int
    pictures: Callable[[jax.Array], Any]
    positions: Callable[[jax.Array, jax.Array], jax.Array] | None


@functools.lru_cache(maxsize=2)  # A run makes its task several times.
def read_spec(
    directory: pathlib.Path,
    size: tuple[int, int],
    *,
    splitting: bool,
    dtype: jnp.dtype,
    remat: bool,
) -> VLMSpec:
    """Reads a vision-language model of a local directory in the hub's format, but its parameters.

    Args:
      directory: see `processing.load_processor` and `qwen_processing.load_processor`.
      size: of the pictures, height and width in pixels.
      splitting: its processor may cut a picture into tiles; see `processing.Processor.whole`.
      dtype: of the computation.
      remat: recompute each block's activations in the backward pass.

    Raises:
      ValueError: the family is not supported, or the model was not trained to chat.
    """
    plan = hub.read_blueprint("vision_language_model", directory, dtype=dtype, remat=remat)
    model = cast(VisionLanguageModel, plan.model)
    if plan.config["model_type"] in qwen_vl.DECODERS:
        return _qwen_sight(directory, size, model)
    processor = processing.load_processor(directory)
    processor = processor if splitting else processor.whole()

    def read(text: str) -> list[int]:
        there = np.ones((1, 1), bool)
        return processor.prompts([text], there, size, length=None, side="left")[0][0].tolist()

    tokenizer = processor.tokenizer
    if plan.config["model_type"] in PLAIN:
        template = Template(processor.mark, "", "", stop_tokens(tokenizer, directory))
    else:
        template = read_template(tokenizer, directory, picture=True)
        start = tokenizer.bos_token
        # A template may begin with what the tokenizer puts before any text.
        if start is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            template = template._replace(before=template.before.removeprefix(start))
    vocabulary = model.language.vocabulary
    chat = VisionChatTokenizer(tokenizer, template, model.image_token, vocabulary, read)

    def pictures(images: jax.Array) -> Tiles | AnyresTiles:
        return processor.pixels(images[:, None])

    return VLMSpec(model, chat, processor.image_tokens(size, 1), pictures, None)


def _qwen_sight(
    directory: pathlib.Path, size: tuple[int, int], model: VisionLanguageModel
) -> VLMSpec:
    processor = qwen_processing.load_processor(directory)
    spec = processor.pixels
    high, wide = qwen_processing.smart_resize(*size, spec)
    rows, columns = qwen_processing.grid(high // spec.patch, wide // spec.patch, spec.merge)

    def packed(patches: Any, batch: int) -> PatchImages:
        rest = (np.zeros_like(rows), rows, columns)
        return PatchImages(patches, *(jnp.broadcast_to(x, (batch, len(rows))) for x in rest))

    def pictures(images: jax.Array) -> PatchImages:
        cut = functools.partial(qwen_processing.cut_image, spec=spec)
        return packed(jax.vmap(cut)(images), len(images))

    def positions(tokens: jax.Array, present: jax.Array) -> jax.Array:
        is_image, images = tokens == model.image_token, packed(None, len(tokens))
        return qwen_processing.axial_positions(is_image, present, images, spec.merge)

    chat = VisionChatTokenizer(
        processor.tokenizer,
        read_template(processor.tokenizer, directory, picture=True),
        model.image_token,
        model.language.vocabulary,
        lambda text: processor.ids(text, [size]),
    )
    return VLMSpec(model, chat, len(rows) // spec.merge**2, pictures, positions)
