"""Pretrained models as control policies or parts of them.

Sentence encoders, vision towers, and whole vision-language models.
"""

from collections.abc import Callable, Sequence
import functools
import math
import pathlib
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.tiles import AnyresTiles, AnyresVision, TiledVision, Tiles
from mmrl_jax.models.towers import Pictures, TextTower, VisionTower
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained import bundled_weights, chat, hub, processing, processor_files
from mmrl_jax.pretrained.families import vlm

# (tokens int32 [B, L], mask bool [B, L]) -> features [B, L', E], present bool [B, L'].
Reader = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
MINILM = "minilm"


@functools.lru_cache(maxsize=4)  # A run makes its network several times.
def sentence_reader(encoder: str, sentences: tuple[str, ...], words: tuple[str, ...]) -> Reader:
    """A frozen sentence encoder, behind an environment that knows a closed set of sentences.

    All are read once, here; in the policy an instruction is looked up, so that a tower of any size
    costs nothing there. Its features are constants of the policy, and are not trained.

    Args:
      encoder: 'minilm', or a local directory in the hub's format, see `hub.load_text_tower`.
      sentences: every instruction, of `words`.
      words: word i has token i + 1; 0 is padding.

    Returns:
      A function whose features of an unknown instruction are NaN: nothing may be learned from it.
      No word at all is what a learner makes of a step that does not count: its features are 0.

    Raises:
      ImportError, ValueError: see `bundled_weights.minilm`, `hub.load_text_tower`.
    """
    features, present = read(encoder, sentences)
    find = _finder(sentences, words)

    def reader(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        index, known = find(tokens, mask)
        found = jnp.where(known[:, None, None], jnp.asarray(features)[index], jnp.nan)
        return found, jnp.asarray(present)[index]

    return reader


def _finder(sentences: Sequence[str], words: Sequence[str]) -> Reader:
    """(tokens, mask) -> index int32 [B] of the sentence, and bool [B], whether it is one of them.

    Padding alone counts as the first: learners put zeros in place of observations that do not
    count, and one that is NaN would spoil the gradient of all others.
    """
    tokens = [[words.index(word) + 1 for word in sentence.split()] for sentence in sentences]
    rows = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
    for row, ids in zip(rows, tokens, strict=True):
        row[: len(ids)] = ids

    def find(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        said = jnp.where(mask, tokens, 0)
        length = max(said.shape[1], rows.shape[1])
        said = jnp.pad(said, ((0, 0), (0, length - said.shape[1])))
        table = np.pad(rows, ((0, 0), (0, length - rows.shape[1])))
        same = jnp.all(said[:, None] == table, axis=-1)
        return jnp.argmax(same, axis=1), jnp.any(same, axis=1) | ~jnp.any(said, axis=1)

    return find


def directory_of(encoder: str) -> pathlib.Path:
    """The directory of a text encoder, 'minilm' or a local one in the hub's format."""
    return bundled_weights.minilm() if encoder == MINILM else pathlib.Path(encoder)


@functools.lru_cache(maxsize=2)
def read(encoder: str, sentences: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [I, S, E] of the tokens of sentences, and bool [I, S], where they are."""
    directory = directory_of(encoder)
    model, variables, _ = hub.load_text_tower(directory)
    tokenizer = processor_files.read_tokenizer(directory)
    batch = tokenizer(list(sentences), return_tensors="np", padding=True)
    chat.check_ids(
        tokenizer, batch["input_ids"].flat, cast(TextTower, model).vocabulary, "an instruction"
    )
    present = batch["attention_mask"].astype(bool)
    apply: Callable = jax.jit(model.apply)
    return np.asarray(apply(variables, batch["input_ids"], present).tokens), present


class Encoder(NamedTuple):
    """A module, and the parameters that it was pretrained to."""

    module: nn.Module
    params: Any


@functools.lru_cache(maxsize=2)
def vision_encoder(directory: str, dtype: jnp.dtype, remat: bool) -> Encoder:
    """A vision tower for `MultimodalPolicy.vision_encoder`, from a local directory.

    Raises:
      ValueError: see `hub.load_vision_tower` and `processor_files.read_image_processor`.
    """
    loaded = hub.load_vision_tower(directory, remat=remat)
    image = processor_files.read_image_processor(directory, loaded.config["model_type"])
    # The policy trains its parameters in float32, whatever it computes in.
    tower = cast(VisionTower, loaded.model).clone(dtype=dtype, pool=None, projection=None)
    params = loaded.params["params"]
    kept = {name: x for name, x in params.items() if name not in ("head", "projection")}
    if not tower.norm_tokens:
        kept.pop("norm")
    module = Pictures(tower, *processor_files.mean_and_std(image))
    return Encoder(module, {"tower": kept})


class ControlModel(NamedTuple):
    """What `VLMPolicy` needs of a vision-language model.

    Attributes:
      model: the module.
      pictures: frames uint8 [B, 1, H, W, 3] to the tiles that it sees, a pure function.
      prompts: instructions to its tokens int32 [B, S] and bool [B, S], where they are.
      grid: its image features are a square grid over the whole frame, behind which a newline may
        come.
    """

    model: VisionLanguageModel
    pictures: Callable[[jax.Array], Tiles | AnyresTiles]
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
    remat: bool,
) -> ControlModel:
    """A vision-language model behind an environment that knows a closed set of sentences.

    All prompts are made once, here; in the policy an instruction's is looked up. Parameters are
    not read, see `vision_language_params`.

    A frame is seen as one tile, see `processing.Processor.whole`.

    Args:
      directory: local, in the hub's format, see `processing.load_processor`.
      prompt: what the model reads, with '{image}' and '{instruction}'.
      sentences: every instruction, of `words`.
      words: word i has token i + 1; 0 is padding.
      size: of a frame, height and width in pixels.
      dtype: of the computation.
      remat: recompute each block's activations in the backward pass.

    Returns:
      See there. The prompt of an unknown instruction has no image token, so that what is made of it
      is NaN.

    Raises:
      ValueError: the family is not supported, or image tokens and features disagree.
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
    words_read = ids[ids != model.image_token]
    chat.check_ids(processor.tokenizer, words_read, model.language.vocabulary, "an instruction")
    # Without an output layer of its own, for no token is predicted.
    model = model.clone(language=model.language.clone(tied=True))
    nothing = int(model.image_token == 0)  # Any other token.
    find = _finder(sentences, words)

    def prompts(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        index, known = find(tokens, mask)
        found = jnp.where(known[:, None], jnp.asarray(ids)[index], nothing)
        return found, jnp.asarray(present)[index]

    plan = processor.family.plan(processor.image, size, 1)
    features = cast(TiledVision | AnyresVision, model.vision).features_per_tile()
    grid = plan.resizes[-1] == plan.tile and math.isqrt(features) ** 2 == features
    return ControlModel(model, processor.pixels, prompts, grid)


def vision_language_params(directory: str) -> Any:
    """The pretrained parameters of `vision_language_model`, float32.

    Raises:
      ValueError: see `hub.load_vision_language_model`.
    """
    params = dict(hub.load_vision_language_model(directory).params["params"])
    language = {name: x for name, x in params["language"].items() if name != "head"}
    return params | {"language": language}
