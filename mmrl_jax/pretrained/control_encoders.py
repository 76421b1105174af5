"""Pretrained sentence encoders and vision-language models in control policies."""

from collections.abc import Callable, Sequence
import functools
import math
import pathlib
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.tiles import AnyresTiles, AnyresVision, TiledVision, Tiles
from mmrl_jax.models.towers import TextTower
from mmrl_jax.models.transformer import Remat
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained import bundled_weights, chat, hub, processing, processor_files
from mmrl_jax.pretrained.families import vlm

# (tokens int32 [B, L], mask bool [B, L]) -> features [B, L', E], mask bool [B, L'].
Reader = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
MINILM = "minilm"


@functools.lru_cache(maxsize=4)  # A run builds its network several times.
def sentence_reader(
    encoder: str, sentences: tuple[str, ...], words: tuple[str, ...], *, blank: bool = False
) -> Reader:
    """Returns a frozen sentence encoder for an environment with a closed set of sentences.

    All sentences are encoded once, here; the policy looks up the features of an instruction, so
    that an encoder of any size costs nothing there. The features are constants of the policy.

    Args:
      encoder: 'minilm', or a local directory in the hub's format, see `hub.load_text_tower`.
      sentences: All possible instructions, whose words must be in `words`.
      words: Vocabulary of the environment: word i has token i + 1, and token 0 is padding.
      blank: Whether features are 0 and no weights are read, for a policy of which only the shapes
        matter.

    Returns:
      A function from instructions to features. The features of an unknown instruction are NaN, so
      that nothing is learned from it. An instruction without words, which learners use for steps
      that do not count, has finite features that are masked out.

    Raises:
      ImportError: The package of 'minilm' is not installed.
      ValueError: The encoder cannot be loaded, see `hub.load_text_tower`.
    """
    features, present = read(encoder, sentences, blank)
    lookup = _sentence_lookup(sentences, words)

    def reader(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        index, known = lookup(tokens, mask)
        selected = jnp.where(known[:, None, None], jnp.asarray(features)[index], jnp.nan)
        return selected, jnp.asarray(present)[index]

    return reader


def _sentence_lookup(sentences: Sequence[str], words: Sequence[str]) -> Reader:
    """Returns (tokens, mask) -> index of the sentence int32 [B], and whether it is known bool [B].

    Padding alone counts as the first sentence: learners replace observations that do not count with
    zeros, and NaN for one of them would make the gradient of all others NaN.
    """
    tokens = [[words.index(word) + 1 for word in sentence.split()] for sentence in sentences]
    rows = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
    for row, ids in zip(rows, tokens, strict=True):
        row[: len(ids)] = ids

    def lookup(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = jnp.where(mask, tokens, 0)
        length = max(ids.shape[1], rows.shape[1])
        ids = jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])))
        table = np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
        matches = jnp.all(ids[:, None] == table, axis=-1)
        return jnp.argmax(matches, axis=1), jnp.any(matches, axis=1) | ~jnp.any(ids, axis=1)

    return lookup


def directory_of(encoder: str) -> pathlib.Path:
    """Returns the directory of a text encoder, given as 'minilm' or as a directory."""
    return bundled_weights.minilm() if encoder == MINILM else pathlib.Path(encoder)


@functools.lru_cache(maxsize=2)
def read(
    encoder: str, sentences: tuple[str, ...], blank: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes I sentences to features float32 [I, S, E] and a mask bool [I, S] of their tokens."""
    directory = directory_of(encoder)
    if blank:
        tower = hub.read_blueprint("text_tower", directory, dtype=jnp.float32, remat=False)
        model, variables = cast(TextTower, tower.model), None
    else:
        loaded = hub.load_text_tower(directory)
        model, variables = cast(TextTower, loaded.model), loaded.params
    tokenizer = processor_files.read_tokenizer(directory)
    batch = tokenizer(list(sentences), return_tensors="np", padding=True)
    chat.check_ids(tokenizer, batch["input_ids"].flat, model.vocabulary, "an instruction")
    present = batch["attention_mask"].astype(bool)
    if blank:
        return np.zeros((*present.shape, model.width), np.float32), present
    apply: Callable = jax.jit(model.apply)
    return np.asarray(apply(variables, batch["input_ids"], present).tokens), present


class ControlModel(NamedTuple):
    """A vision-language model and its inputs, for `VLMPolicy`.

    Attributes:
      model: Linen module.
      preprocess_images: Pure function from frames uint8 [B, 1, H, W, 3] to the tiles that the model
        takes.
      prompts: Function from tokens int32 [B, L] and mask bool [B, L] of an instruction to tokens
        int32 [B, S] and mask bool [B, S] of the model.
      grid: Whether the image features form a square grid over the whole frame, optionally followed
        by a newline.
    """

    model: VisionLanguageModel
    preprocess_images: Callable[[jax.Array], Tiles | AnyresTiles]
    prompts: Reader
    grid: bool


@functools.lru_cache(maxsize=2)
def vision_language_model(
    directory: str,
    prompt: str,
    sentences: tuple[str, ...],
    words: tuple[str, ...],
    size: tuple[int, int],
    dtype: jnp.dtype,
    remat: Remat,
) -> ControlModel:
    """Returns a vision-language model for an environment with a closed set of sentences.

    All prompts are tokenized once, here; the policy looks up that of an instruction. Parameters are
    not read, see `vision_language_params`. The model takes a frame as a single tile, see
    `processing.Processor.whole`.

    Args:
      directory: Local directory in the hub's format, see `processing.load_processor`.
      prompt: Template of the model's prompt, with '{image}' and '{instruction}'.
      sentences: All possible instructions, whose words must be in `words`.
      words: Vocabulary of the environment: word i has token i + 1, and token 0 is padding.
      size: Height and width of a frame in pixels.
      dtype: Compute dtype.
      remat: What of each block is recomputed in the backward pass, see `Remat`.

    Returns:
      The model and its inputs. The prompt of an unknown instruction has no image token, so that the
      output of the model for it is NaN.

    Raises:
      ValueError: The family is not supported, or image tokens and features disagree.
    """
    processor = processing.load_processor(directory).whole()
    texts = [
        prompt.replace("{image}", processor.mark).replace("{instruction}", sentence)
        for sentence in sentences
    ]
    ids, present = processor.prompts(
        texts, np.ones((len(texts), 1), bool), size, length=None, side="right"
    )
    config = hub.read_config(directory)
    model = vlm.FAMILIES[config["model_type"]](config, (), dtype, remat).model
    text_ids = ids[ids != model.image_token]
    chat.check_ids(processor.tokenizer, text_ids, model.language.vocabulary, "an instruction")
    # No token is predicted, so the model is built without an output layer.
    model = model.clone(language=model.language.clone(tied=True))
    filler = int(model.image_token == 0)  # Any token that is not the image token.
    lookup = _sentence_lookup(sentences, words)

    def prompts(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        index, known = lookup(tokens, mask)
        selected = jnp.where(known[:, None], jnp.asarray(ids)[index], filler)
        return selected, jnp.asarray(present)[index]

    plan = processor.family.plan(processor.image, size, 1)
    features = cast(TiledVision | AnyresVision, model.vision).features_per_tile()
    grid = plan.resizes[-1] == plan.tile and math.isqrt(features) ** 2 == features
    return ControlModel(model, processor.pixels, prompts, grid)


def vision_language_params(directory: str) -> Any:
    """Returns the pretrained parameters of `vision_language_model` in float32.

    Args:
      directory: Local directory in the hub's format.

    Raises:
      ValueError: The model cannot be loaded, see `hub.load_vision_language_model`.
    """
    params = dict(hub.load_vision_language_model(directory).params["params"])
    language = {name: x for name, x in params["language"].items() if name != "head"}
    return params | {"language": language}
