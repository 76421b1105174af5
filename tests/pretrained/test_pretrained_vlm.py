"""Compares vision-language models of every family with torch layer by layer."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmrl_jax.models import vlm
from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.masks import Mask
from mmrl_jax.models.tiles import AnyresTiles, Tiles
from mmrl_jax.models.towers import cut_patches, stretched_positions
from mmrl_jax.models.transformer import Context
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained import weights
from tests import hub

DECODE, PLACE, SWAPAXES = LanguageModel.hidden_states, vlm.scatter_features, jnp.swapaxes
IMAGE = 100  # The id of the image token.
TEXT = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GEMMA2 = {
    "model_type": "gemma2",
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 10,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
FAMILIES = {
    "smolvlm": (
        "SmolVLM",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION,
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
    ),
    "idefics3": (
        "Idefics3",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION,
            "scale_factor": 2,
            "image_token_id": IMAGE,
            "tie_word_embeddings": True,
        },
    ),
    "paligemma": (
        "PaliGemma",
        {
            "text_config": TEXT | {"model_type": "gemma", "vocab_size": IMAGE},
            "vision_config": SIGLIP | {"vision_use_head": True},
            "image_token_index": IMAGE,
            "projection_dim": 48,
        },
    ),
    "paligemma2": (
        "PaliGemma",
        {
            "text_config": TEXT | GEMMA2,
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "projection_dim": 48,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
        },
    ),
    "llava_siglip": (
        "Llava",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": False,
        },
    ),
    "llava_onevision": (
        "LlavaOnevision",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": 99,
            "image_grid_pinpoints": [[32, 32], [32, 64], [64, 64], [64, 96], [96, 96], [96, 32]],
            "vision_aspect_ratio": "anyres_max_4",
        },
    ),
}
SAMPLES, TILES = 3, np.array([2, 1, 3])  # Tiles of each sample.
# Sizes of images and the grids that the pinpoints give them: as wide as it is, of another shape
# than the grid, of more tiles than are kept, one tile; and several images, which have no grid.
ANYRES = [
    ((60, 60), (2, 2)),
    ((50, 90), (2, 3)),
    ((90, 90), (3, 3)),
    ((70, 94), (3, 3)),
    ((96, 20), (3, 1)),
    ((20, 30), (1, 1)),
    ((60, 40), (0, 0)),
]


@functools.cache
def pair(family, directory):
    """Returns the torch model, and our model loaded from its files."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**changes)
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    config._attn_implementation = "eager"
    theirs = hub.save(model._from_config(config, attn_implementation="eager"), directory / family)
    return theirs, ours.load_vision_language_model(directory / family)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def pictures(family, anyres=ANYRES[1]):
    """Returns tiles; those of Idefics3 are partly padded with 0."""
    if family == "llava_onevision":
        return anyres_pictures(*anyres)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(SAMPLES, TILES.max(), 32, 32, 3)).astype(np.float32)
    present = np.arange(TILES.max()) < TILES[:, None]
    if family in ("smolvlm", "idefics3"):
        present = np.repeat(present[..., None], 4, axis=2)[..., None] & np.ones(4, bool)
        present[0, 0, 3:] = present[2, 1, :, 2:] = present[2, 2, 2:] = False
        present[2, 2, :, 3:] = False
    filled = present.reshape(*present.shape, *(1,) * (4 - present.ndim))
    filled = np.broadcast_to(filled, (*present.shape[:2], 4, 4))
    pixels *= np.kron(filled, np.ones((8, 8)))[..., None]
    return Tiles(pixels, present)


def anyres_pictures(size, grid):
    """Returns one image with a grid for each sample, or several images without."""
    rng, counts = np.random.default_rng(0), np.array([2, 2, 3] if grid == (0, 0) else [1, 1, 1])
    shape = (SAMPLES, counts.max(), grid[0] * grid[1] + 1, 32, 32, 3)
    present = np.arange(counts.max()) < counts[:, None]
    return AnyresTiles(rng.normal(size=shape).astype(np.float32), present, size, grid)


def prompts(model, images):
    """Returns prompts with images and words, padded on the left and on the right."""
    if isinstance(images, AnyresTiles):
        count, present = model.vision.features_per_image(images.size, images.grid), images.present
    else:
        count = model.vision.features_per_tile()
        present = images.present.reshape(*images.present.shape[:2], -1).any(axis=2)
    rng = np.random.default_rng(1)
    rows = []
    for pieces in present.sum(axis=1):
        row = [1]
        for _ in range(pieces):
            row += [IMAGE] * count + list(rng.integers(2, IMAGE, 2))
        rows.append(row + list(rng.integers(2, IMAGE, 4)))
    length = max(map(len, rows)) + 1
    tokens = np.zeros((SAMPLES, length), np.int64)
    tokens[0, -len(rows[0]) :] = rows[0]
    tokens[1, : len(rows[1])] = rows[1]
    tokens[2, 1 : len(rows[2]) + 1] = rows[2]
    present = tokens > 0
    last = np.max(np.where(tokens == IMAGE, np.arange(length), 0), axis=1)
    prompt = np.arange(length) <= last[:, None] + 2  # The last two words are an answer.
    return tokens, present, prompt


def expected(family, theirs, images, tokens, present, prompt):
    """Returns the outputs of torch."""
    pixels, there = images.pixels, images.present
    inputs = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(present.astype(np.int64)),
        "position_ids": torch.tensor(np.maximum(np.cumsum(present, axis=1) - 1, 0)),
    }
    torch_pixels = torch.tensor(np.moveaxis(pixels, -1, -3))
    if family == "llava_onevision":
        inputs |= {
            "pixel_values": torch_pixels[torch.tensor(there)],
            "image_sizes": torch.tensor([images.size] * there.sum()),
            "batch_num_images": torch.tensor(there.sum(axis=1)),
        }
    elif there.ndim == 4:
        mask = np.kron(there, np.ones((8, 8), bool)).astype(np.int64)
        inputs |= {"pixel_values": torch_pixels, "pixel_attention_mask": torch.tensor(mask)}
    else:
        inputs |= {"pixel_values": torch_pixels[torch.tensor(there)]}
    if "paligemma" in family:
        inputs["token_type_ids"] = torch.tensor((~prompt).astype(np.int64))
    with torch.no_grad():
        return theirs(**inputs, output_hidden_states=True)


def largest_error(family, theirs, model, params, anyres=ANYRES[1]):
    """Returns the largest error over decoder layers, features and logits."""
    images = pictures(family, anyres)
    tokens, present, prompt = prompts(model, images)

    def run(model, tokens, present, images, prompt):
        logits = model(tokens, present, images, prompt=prompt)
        return logits, model.encode(images)

    inputs = jax.tree.map(jnp.asarray, (tokens, present, images, prompt))
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(functools.partial(model.apply, method=run, mutable=["hidden"]))
        (logits, features), seen = apply(params, *inputs)
    out = expected(family, theirs, images, tokens, present, prompt)
    image = out.image_hidden_states
    image = torch.cat(list(image.pooler_output)) if hasattr(image, "pooler_output") else image
    image = np.asarray(image).reshape(-1, 48)
    mine = np.asarray(features.tokens)[np.asarray(features.present)]
    errors = [hub.error(mine, image, np.ones(len(image), bool))]
    errors.append(hub.error(logits, out.logits, present))
    stack = seen["hidden"]["language"]["stack"]
    for i in range(model.language.layers - 1):  # transformers gives the last one after its norm.
        errors.append(hub.error(stack[f"block_{i}"]["out"][0], out.hidden_states[i + 1], present))
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_every_layer_and_the_logits_are_torch_s(family, directory):
    theirs, (model, params, _) = pair(family, directory)
    assert largest_error(family, theirs, model, params) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_full_pass(family, directory):
    _, (model, params, _) = pair(family, directory)
    images = pictures(family)
    tokens, present, _ = prompts(model, images)
    images = jax.tree.map(jnp.asarray, images)
    assert hub.generation_error(model, params, tokens, present, images) < 2e-4


@pytest.mark.parametrize("anyres", ANYRES, ids=str)
def test_images_of_any_shape_are_torch_s(anyres, directory):
    theirs, (model, params, _) = pair("llava_onevision", directory)
    assert largest_error("llava_onevision", theirs, model, params, anyres) < 1e-5


def tower(**changes):
    return lambda model: model.clone(
        vision=model.vision.clone(tower=model.vision.tower.clone(**changes))
    )


def tower_block(**changes):
    return lambda model: tower(block=dataclasses.replace(model.vision.tower.block, **changes))(
        model
    )


def vision(**changes):
    return lambda model: model.clone(vision=model.vision.clone(**changes))


def language(**changes):
    return lambda model: model.clone(language=model.language.clone(**changes))


MUTATIONS = [
    ("smolvlm", "activation of the tower", tower_block(activation="gelu")),
    ("smolvlm", "norm of the tower", tower(norm_tokens=False)),
    ("idefics3", "activation of the tower", tower_block(activation="gelu")),
    ("paligemma", "epsilon of the tower", tower_block(epsilon=1e-3)),
    ("paligemma", "mask", lambda model: model.clone(prefix_lm=False)),
    ("paligemma", "scale of embeddings", language(embedding_scale=1.0)),
    ("paligemma2", "mask", lambda model: model.clone(prefix_lm=False)),
    ("paligemma2", "windows", language(windows=(None, 6))),
    ("paligemma2", "scale of embeddings", language(embedding_scale=1.0)),
    ("llava", "feature layer", tower(layers=1)),
    ("llava", "class token and feature layer", tower(layers=0)),
    ("llava", "activation of the projector", vision(activation="silu")),
    ("llava", "activation of the tower", tower_block(activation="gelu")),
    ("llava", "norm before the tower", tower(pre_norm=False)),
    ("llava_siglip", "feature layer", tower(layers=2)),
    ("llava_siglip", "activation of the projector", vision(activation="silu")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mutate"),
    [(f, m) for f, _, m in MUTATIONS],
    ids=[f"{f}: {n}" for f, n, _ in MUTATIONS],
)
def test_a_mutation_is_noticed(family, mutate, directory):
    theirs, (model, params, _) = pair(family, directory)
    assert largest_error(family, theirs, mutate(model), params) > 1e-4


def without_newline(model, params):
    vision = params["params"]["vision"]
    vision = vision | {"newline": jnp.zeros_like(vision["newline"])}
    return model, {"params": params["params"] | {"vision": vision}}


def before_the_last_block(model, params):
    tower = model.vision.tiles.tower.clone(layers=2)
    tiles = model.vision.tiles.clone(tower=tower)
    return model.clone(vision=model.vision.clone(tiles=tiles)), params


@pytest.mark.parametrize("anyres", [ANYRES[1], ANYRES[-1]], ids=str)
@pytest.mark.parametrize("mutate", [without_newline, before_the_last_block])
def test_a_mutation_is_noticed_for_images_of_any_shape(mutate, anyres, directory):
    theirs, (model, params, _) = pair("llava_onevision", directory)
    mutated = mutate(model, params)
    assert largest_error("llava_onevision", theirs, *mutated, anyres) > 1e-4


def columns_first(x, patch):
    return cut_patches(jnp.swapaxes(x, 1, 2), patch)


def unstretched(present, edge):
    return jnp.broadcast_to(jnp.arange(edge**2), (present.shape[0], edge**2))


def explicit(mask, length):
    """The same mask before windows, whose prompt they narrow too."""
    return Mask(explicit=mask.allowed(length, length))


# What stands in for a function of mmrl_jax.models.
REPLACEMENTS = [
    ("smolvlm", "order of the pixel shuffle", "tiles.cut_patches", columns_first),
    ("smolvlm", "positions in part-filled tiles", "towers.stretched_positions", unstretched),
    ("smolvlm", "mask of part-filled tiles", "towers.Context", lambda mask: Context(Mask())),
    (
        "paligemma2",
        "the prompt sees through windows",
        "vlm.LanguageModel.hidden_states",
        lambda self, x, mask, *args: DECODE(self, x, explicit(mask, x.shape[1]), *args),
    ),
    (
        "llava_onevision",
        "order of the grid's tokens",
        "tiles.jnp.swapaxes",
        lambda x, *axes: x if axes == (2, 3) and x.ndim == 6 else SWAPAXES(x, *axes),
    ),
    (
        "llava",
        "order of features",
        "vlm.scatter_features",
        lambda x, is_image, *features: PLACE(x[:, ::-1], is_image[:, ::-1], *features)[:, ::-1],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "other"),
    [(f, n, o) for f, _, n, o in REPLACEMENTS],
    ids=[f"{f}: {t}" for f, t, _, _ in REPLACEMENTS],
)
def test_a_replaced_function_is_noticed(family, name, other, directory, monkeypatch):
    theirs, (model, params, _) = pair(family, directory)
    monkeypatch.setattr(f"mmrl_jax.models.{name}", other)
    assert largest_error(family, theirs, model, params) > 1e-4


@pytest.mark.parametrize("edge", [4, 26, 27, 32])  # Idefics3 and SmolVLM have the last three.
def test_positions_in_a_part_filled_tile_are_torch_s(edge):
    config = transformers.Idefics3VisionConfig(hidden_size=1, patch_size=1, image_size=edge)
    embed = transformers.models.idefics3.modeling_idefics3.Idefics3VisionEmbeddings(config)
    order = np.arange(edge)
    filled = [(n, edge + 1 - n) for n in range(1, edge + 1)]
    present = np.stack([(order < h)[:, None] & (order < w)[None] for h, w in filled])
    with torch.no_grad():
        embed.patch_embedding.weight.zero_()
        embed.patch_embedding.bias.zero_()
        embed.position_embedding.weight.copy_(torch.arange(edge**2)[:, None])
        theirs = embed(torch.zeros(edge, 3, edge, edge), torch.tensor(present))[..., 0]
    np.testing.assert_array_equal(stretched_positions(jnp.asarray(present), edge), theirs)


def test_counts_that_disagree_raise_on_the_host_and_are_nan_inside_jit(directory):
    _, (model, params, _) = pair("llava", directory)
    images = pictures("llava")
    tokens, present, _ = prompts(model, images)
    there = np.repeat(images.present, model.vision.features_per_tile(), axis=1)
    vlm.check_counts(tokens == IMAGE, there)
    where = np.argmax(tokens[1] == IMAGE)
    tokens[1, where] = 5  # A word in place of an image token.
    with pytest.raises(ValueError, match="Sample 1 has 15 image tokens.* 16 features"):
        vlm.check_counts(tokens == IMAGE, there)
    logits = np.asarray(jax.jit(model.apply)(params, tokens, present, images))
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


def rewrite(source, target, rename):
    """Copies a model with other names of its tensors; None removes a tensor."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = {rename(name): x for name, x in load_file(source / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, target / "model.safetensors")


def test_the_tower_s_names_of_before_transformers_5_are_read(directory, tmp_path):
    _, (_, params, _) = pair("llava", directory)
    rewrite(
        directory / "llava",
        tmp_path / "before",
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    )
    before = ours.load_vision_language_model(tmp_path / "before").params
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_what_is_missing_or_unexpected_is_named(directory, tmp_path):
    pair("llava", directory)
    absent = "multi_modal_projector.linear_1.bias"
    rewrite(
        directory / "llava",
        tmp_path / "other",
        lambda name: {absent: None, "language_model.lm_head.weight": "head"}.get(name, name),
    )
    with pytest.raises(weights.WeightMismatch) as error:
        ours.load_vision_language_model(tmp_path / "other")
    for line in (
        f"missing: {absent}",
        "missing: language_model.lm_head.weight",
        "unexpected: head",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"model_type": "pixtral"}, "'pixtral' is not supported"),
        ("text_config", {"model_type": "opt"}, "'opt' is not supported"),
        (None, {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\]"),
    ],
)
def test_what_is_not_supported_is_named(part, changes, message, directory, tmp_path):
    pair("llava", directory)
    rewrite(directory / "llava", tmp_path / "other", lambda name: name)
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        ours.load_vision_language_model(tmp_path / "other")


def test_bfloat16_with_recomputation_has_finite_gradients(directory):
    pair("smolvlm", directory)
    model, params, _ = ours.load_vision_language_model(
        directory / "smolvlm", dtype=jnp.bfloat16, remat=True
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    images = pictures("smolvlm")
    tokens, present, _ = prompts(model, images)
    inputs = jax.tree.map(jnp.asarray, (tokens, present, images))
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(model.apply(p, *inputs) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), path
        if "key/bias" not in "/".join(k.key for k in path):  # Shifts a query's scores alike.
            assert np.any(np.asarray(leaf) != 0), path
