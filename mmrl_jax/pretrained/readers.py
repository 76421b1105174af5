"""Pretrained encoders as parts of control policies: sentence encoders and vision towers."""

from collections.abc import Callable, Sequence
import functools
import json
import pathlib
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.models.towers import Pictures, VisionTower
from mmrl_jax.pretrained import hub, packages

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
      ImportError, ValueError: see `packages.minilm`, `hub.load_text_tower`.
    """
    features, present = read(encoder, sentences)
    tokens = [[words.index(word) + 1 for word in sentence.split()] for sentence in sentences]
    known = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
    for row, ids in zip(known, tokens, strict=True):
        row[: len(ids)] = ids

    def reader(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        said = jnp.where(mask, tokens, 0)
        length = max(said.shape[1], known.shape[1])
        said = jnp.pad(said, ((0, 0), (0, length - said.shape[1])))
        table = np.pad(known, ((0, 0), (0, length - known.shape[1])))
        same = jnp.all(said[:, None] == table, axis=-1)
        index = jnp.argmax(same, axis=1)
        found = jnp.asarray(features)[index]
        silent = ~jnp.any(mask, axis=1)
        otherwise = jnp.where(silent, 0.0, jnp.nan)[:, None, None]
        found = jnp.where(jnp.any(same, axis=1)[:, None, None], found, otherwise)
        return found, jnp.asarray(present)[index] & ~silent[:, None]

    return reader


def read(encoder: str, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [I, S, E] of the tokens of sentences, and bool [I, S], where they are."""
    from transformers import AutoTokenizer

    directory = packages.minilm() if encoder == MINILM else pathlib.Path(encoder)
    model, variables, _ = hub.load_text_tower(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    batch = tokenizer(list(sentences), return_tensors="np", padding=True)
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
      ValueError: see `hub.load_vision_tower`; or the directory has no preprocessor_config.json.
    """
    path = pathlib.Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no preprocessor_config.json, which says mean and std.")
    how = json.loads(path.read_text(encoding="utf-8"))
    loaded = hub.load_vision_tower(directory, remat=remat)
    # The policy trains its parameters in float32, whatever it computes in.
    tower = cast(VisionTower, loaded.model).clone(dtype=dtype, pool=None, projection=None)
    params = loaded.params["params"]
    kept = {name: x for name, x in params.items() if name not in ("head", "projection")}
    if not tower.norm_tokens:
        kept.pop("norm")
    module = Pictures(tower, tuple(how["image_mean"]), tuple(how["image_std"]))
    return Encoder(module, {"tower": kept})
