"""Prompts with an image and their completions, as tokens of a pretrained vision-language model.

    prompt        <|im_start|> User : <image> ... <image> how many ? <end_of_utterance> Assistant :
    completion    two <end_of_utterance>

Template, tokens and images are those of the model's own processor; images inside `jit`.
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
from mmrl_jax.models.transformer import Remat
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
from mmrl_jax.tasks.samples import short_repr

FAMILIES = (*processing.FAMILIES, *qwen_vl.DECODERS)
# Families that were trained on an image and words without a template.
PLAIN = ("paligemma",)


@dataclasses.dataclass(frozen=True, eq=False)
class VisionChatTokenizer(ChatTokenizer):
    """Tokenizes prompts with an image and completions, see `ChatTokenizer`.

    Attributes:
      read: Function from a text with the mark of an image to token ids, with one image token per
        feature.
    """

    read: Callable[[str], list[int]]

    def encode_prompt(self, text: str, *, images: int) -> list[int]:
        """Returns the token ids of a prompt with an image.

        Args:
          text: Text of the prompt.
          images: Number of image tokens.

        Raises:
          ValueError: The processor gives the image a different number of tokens, or the text
            contains the mark of an image; or the text is invalid, see `check_text` and `check_ids`.
        """
        check_text(text, "prompt")
        ids = self.read(self.template.before + text + self.template.after)
        count = ids.count(self.image)
        if count != images:
            raise ValueError(
                f"The prompt has {count} image tokens, but the image has {images} features."
            )
        # Features replace the embeddings of image tokens, which therefore need no rows.
        words = [token for token in ids if token != self.image]
        check_ids(self.tokenizer, words, self.vocabulary, f"prompt {short_repr(text)}")
        return ids


class VLMSpec(NamedTuple):
    """A model for prompts with an image of a fixed size, without its parameters.

    Attributes:
      model: Linen module.
      chat: Tokenizer of prompts and completions.
      image_tokens: Number of image tokens of an image, one per feature of the vision model.
      preprocess_images: Pure function from images uint8 [B, H, W, 3] to the inputs of the vision
        model.
      positions: Function from tokens int32 [B, S] and mask bool [B, S] to positions int32 [B, A, S]
        for a rotary embedding of A axes; None if positions are consecutive numbers.
    """

    model: VisionLanguageModel
    chat: VisionChatTokenizer
    image_tokens: int
    preprocess_images: Callable[[jax.Array], Any]
    positions: Callable[[jax.Array, jax.Array], jax.Array] | None


@functools.lru_cache(maxsize=2)  # A run builds its task several times.
def read_spec(
    directory: pathlib.Path,
    size: tuple[int, int],
    *,
    splitting: bool,
    dtype: jnp.dtype,
    remat: Remat,
) -> VLMSpec:
    """Reads a vision-language model of a local directory in the hub's format without parameters.

    Args:
      directory: Local directory in the hub's format, see `processing.load_processor` and
        `qwen_processing.load_processor`.
      size: Height and width of the images in pixels.
      splitting: Whether the processor may split an image into tiles, see
        `processing.Processor.whole`.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.

    Raises:
      ValueError: The family is not supported, or the model was not trained to chat.
    """
    plan = hub.read_blueprint("vision_language_model", directory, dtype=dtype, remat=remat)
    model = cast(VisionLanguageModel, plan.model)
    if plan.config["model_type"] in qwen_vl.DECODERS:
        return _qwen_spec(directory, size, model)
    processor = processing.load_processor(directory)
    processor = processor if splitting else processor.whole()

    def read(text: str) -> list[int]:
        one_image = np.ones((1, 1), bool)
        return processor.prompts([text], one_image, size, length=None, side="left")[0][0].tolist()

    tokenizer = processor.tokenizer
    if plan.config["model_type"] in PLAIN:
        template = Template(processor.mark, "", "", stop_tokens(tokenizer, directory))
    else:
        template = read_template(tokenizer, directory, with_image=True)
        start = tokenizer.bos_token
        # A template may begin with a token that the tokenizer adds before any text.
        if start is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            template = template._replace(before=template.before.removeprefix(start))
    vocabulary = model.language.vocabulary
    chat = VisionChatTokenizer(tokenizer, template, model.image_token, vocabulary, read)

    def preprocess_images(images: jax.Array) -> Tiles | AnyresTiles:
        return processor.pixels(images[:, None])

    return VLMSpec(model, chat, processor.image_tokens(size, 1), preprocess_images, None)


def _qwen_spec(
    directory: pathlib.Path, size: tuple[int, int], model: VisionLanguageModel
) -> VLMSpec:
    processor = qwen_processing.load_processor(directory)
    spec = processor.pixels
    height, width = qwen_processing.smart_resize(*size, spec)
    rows, columns = qwen_processing.grid(height // spec.patch, width // spec.patch, spec.merge)

    def packed(patches: Any, batch: int) -> PatchImages:
        layout = (np.zeros_like(rows), rows, columns)
        return PatchImages(patches, *(jnp.broadcast_to(x, (batch, len(rows))) for x in layout))

    def preprocess_images(images: jax.Array) -> PatchImages:
        split = functools.partial(qwen_processing.cut_image, spec=spec)
        return packed(jax.vmap(split)(images), len(images))

    def positions(tokens: jax.Array, present: jax.Array) -> jax.Array:
        is_image, images = tokens == model.image_token, packed(None, len(tokens))
        return qwen_processing.axial_positions(is_image, present, images, spec.merge)

    chat = VisionChatTokenizer(
        processor.tokenizer,
        read_template(processor.tokenizer, directory, with_image=True),
        model.image_token,
        model.language.vocabulary,
        lambda text: processor.ids(text, [size]),
    )
    return VLMSpec(model, chat, len(rows) // spec.merge**2, preprocess_images, positions)
