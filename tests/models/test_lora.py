"""Tests of adapters (initialization, merging, training, PEFT format), int8 and splits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from mmrl_jax.models import lora as lora_lib
from mmrl_jax.models.lora import LoraGroup
from mmrl_jax.models.policy import MultimodalPolicy
from mmrl_jax.models.transformer import Dense
from mmrl_jax.pretrained import hub as ours
from mmrl_jax.pretrained.families import decoders
from mmrl_jax.pretrained.peft_format import load_adapter, save_adapter
from mmrl_jax.pretrained.weights import WeightMismatch
from tests import hub

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GROUPS = (
    LoraGroup(r".*/attention/(query|value)", rank=4, alpha=8.0),
    LoraGroup(r"stack/block_1/mlp_.*", rank=2, alpha=3.0),
)
KEYS = decoders.keys("llama")
TOKENS = np.random.default_rng(0).integers(1, 101, (2, 7))
PRESENT = np.ones((2, 7), bool)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    hub.save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), path)
    return path


@pytest.fixture(scope="module")
def loaded(directory):
    model, variables, _ = ours.load_language_model(directory)
    return model, variables["params"]


def random_lora(params, groups=GROUPS):
    """Returns adapters in which neither matrix is zero."""
    fresh = lora_lib.init(jax.random.key(0), params, groups)
    leaves, structure = jax.tree.flatten(fresh)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    )


def logits(model, params, lora=None, **kwargs):
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    with jax.default_matmul_precision("highest"):
        return model.apply(variables, jnp.asarray(TOKENS), jnp.asarray(PRESENT), **kwargs)


def distance(a, b):
    return hub.error(a, b, PRESENT)


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits


def test_fresh_adapters_add_nothing_to_the_bit(loaded):
    model, params = loaded
    lora = lora_lib.init(jax.random.key(0), params, GROUPS)
    a = lora["stack"]["block_0"]["attention"]["query"]["adapter"].a
    # Uniform in +-1 / sqrt(48) = 0.144; 192 draws come within a twentieth of it.
    assert 0.137 < float(jnp.max(jnp.abs(a))) <= 48**-0.5
    np.testing.assert_array_equal(logits(model, params, lora), logits(model, params))


def test_the_first_group_that_matches_a_layer_makes_its_adapter(loaded):
    groups = (LoraGroup(r".*/block_0/.*/query", 3, 6.0), LoraGroup(r".*/query", 2, 1.0, 0.5))
    found = lora_lib.adapters(lora_lib.init(jax.random.key(0), loaded[1], groups))
    assert {path: (x.rank, x.scale, x.dropout) for path, x in found.items()} == {
        "stack/block_0/attention/query": (3, 2.0, 0.0),
        "stack/block_1/attention/query": (2, 0.5, 0.5),
    }


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_merged_parameters_do_what_the_adapters_do(loaded, remat, jit):
    model, params = loaded
    lora, model = random_lora(params), model.clone(remat=remat)

    def run(params, lora=None):
        return logits(model, params, lora)

    run = jax.jit(run) if jit else run
    adapted = run(params, lora)
    assert distance(adapted, run(params)) > 0.1
    # float32 rounding alone, with and without jit, moves these logits by nearly 1e-6.
    assert distance(run(lora_lib.merge(params, lora)), adapted) < 1e-5


def test_a_merged_layer_is_the_adapted_one_to_float32_rounding():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)), jnp.float32)
    model = Dense(32)
    params = {"dense": model.init(jax.random.key(0), x)["params"]}
    lora = random_lora(params, (LoraGroup("dense", rank=4, alpha=8.0),))
    merged = lora_lib.merge(params, lora)
    with jax.default_matmul_precision("highest"):
        a = model.apply({"params": params["dense"], "lora": lora["dense"]}, x)
        b = model.apply({"params": merged["dense"]}, x)
    assert hub.error(a, b, np.ones(64, bool)) < 1e-6


def test_unmerging_restores_the_parameters(loaded):
    _, params = loaded
    lora = random_lora(params)
    merged = lora_lib.merge(params, lora)
    changed = [x is not y for x, y in zip(*map(jax.tree.leaves, (params, merged)), strict=True)]
    assert sum(changed) == 2 * 2 + 3  # Query and value of two blocks, three matrices of an MLP.
    for x, y in zip(*map(jax.tree.leaves, (params, lora_lib.unmerge(merged, lora))), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_dropout_is_off_without_its_random_stream_and_unbiased_with_it():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    model = Dense(5)
    params = model.init(jax.random.key(0), x)["params"]
    adapter = lora_lib.Adapter(jnp.ones((32, 1)), jnp.ones((1, 5)), alpha=1.0, dropout=0.25)
    variables = {"params": params, "lora": {"adapter": adapter}}
    plain = model.apply(variables, x)
    whole = {"params": params, "lora": {"adapter": adapter.replace(dropout=0.0)}}
    np.testing.assert_array_equal(plain, model.apply(whole, x))
    rngs = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.vmap(lambda key: model.apply(variables, x, rngs={"dropout": key}))(rngs)
    # Each input is kept with 3/4 and then 4/3 as large: variance (4/3 - 1) x^2.
    expected = jnp.sqrt(jnp.sum(x**2, axis=1) / 3)
    np.testing.assert_allclose(jnp.std(drawn, axis=0)[:, 0], expected, rtol=0.05)
    error = jnp.abs(jnp.mean(drawn, axis=0) - plain)
    assert jnp.all(error < 4 * expected[:, None] / 4000**0.5)


def test_dropout_goes_through_remat_and_differs_between_layers(loaded):
    model, params = loaded
    lora = random_lora(params, (LoraGroup(r".*/query", 4, 8.0, 0.5),))
    for m in (model, model.clone(remat=True)):
        first, again, other = (
            logits(m, params, lora, rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert distance(first, other) > 1e-3


def test_training_moves_the_adapters_and_nothing_else(loaded):
    model, params = loaded
    lora = lora_lib.init(jax.random.key(0), params, GROUPS)
    target = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 101)), jnp.float32)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    state = optimizer.init(lora)
    grad = jax.jit(jax.grad(lambda lora: jnp.mean((logits(model, params, lora) - target) ** 2)))
    before = lora
    for step in range(2):
        gradient = grad(lora)
        for path, x in lora_lib.adapters(gradient).items():
            assert jnp.any(x.b != 0), path
            assert jnp.any(x.a != 0) == (step > 0), path  # b is zero at first.
        updates, state = optimizer.update(gradient, state, lora)
        lora = optax.apply_updates(lora, updates)
    for path, x in lora_lib.adapters(lora).items():
        old = lora_lib.adapters(before)[path]
        assert (x.alpha, x.dropout) == (old.alpha, old.dropout)
        assert jnp.any(x.a != old.a) and jnp.any(x.b != old.b)


def test_an_adapter_saved_here_gives_the_same_logits_in_peft(loaded, directory, tmp_path):
    model, params = loaded
    lora = random_lora(params)
    save_adapter(tmp_path, lora, KEYS, base=str(directory), task_type="CAUSAL_LM")
    base = transformers.LlamaForCausalLM.from_pretrained(directory)
    plain = torch_logits(base)
    theirs = torch_logits(peft.PeftModel.from_pretrained(base, tmp_path).eval())
    assert distance(plain, theirs) > 0.1
    assert distance(logits(model, params, lora), theirs) < 1e-5
    back = load_adapter(tmp_path, params, KEYS)
    assert jax.tree.structure(back) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, back, lora)


def saved_by_peft(directory, path, **options):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM.from_pretrained(directory)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
            "alpha_pattern": {"o_proj": 9},
            "lora_dropout": 0.1,
        },
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj"], "use_rslora": True},
    ],
    ids=["patterns", "all-linear", "rank-stabilised"],
)
def test_an_adapter_that_peft_saved_gives_the_same_logits_here(
    loaded, directory, tmp_path, options
):
    model, params = loaded
    theirs = torch_logits(saved_by_peft(directory, tmp_path, **options))
    lora = load_adapter(tmp_path, params, KEYS)
    assert {x.dropout for x in lora_lib.adapters(lora).values()} == {
        options.get("lora_dropout", 0.0)
    }
    assert distance(logits(model, params), theirs) > 0.1
    assert distance(logits(model, params, lora), theirs) < 1e-5


def test_an_adapter_in_bfloat16_is_read(loaded, directory, tmp_path):
    saved_by_peft(directory, tmp_path / "a", target_modules=["v_proj"]).to(
        torch.bfloat16
    ).save_pretrained(tmp_path / "b")
    a, b = (load_adapter(tmp_path / name, loaded[1], KEYS) for name in "ab")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), a, b)
    assert {x.dtype for x in jax.tree.leaves(b)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("an_option_to_come", 3),
    ],
)
def test_an_option_that_we_do_not_have_is_refused(loaded, tmp_path, option, value):
    save_adapter(tmp_path, random_lora(loaded[1]), KEYS, base="", task_type="CAUSAL_LM")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=option):
        load_adapter(tmp_path, loaded[1], KEYS)


def test_a_pickle_is_refused(loaded, tmp_path):
    save_adapter(tmp_path, random_lora(loaded[1]), KEYS, base="", task_type="CAUSAL_LM")
    shutil.move(tmp_path / "adapter_model.safetensors", tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(tmp_path, loaded[1], KEYS)


def test_tensors_that_fit_no_layer_are_named(loaded, directory, tmp_path):
    saved_by_peft(directory, tmp_path, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(WeightMismatch, match=r"unexpected: .*embed_tokens\.lora_embedding_A"):
        load_adapter(tmp_path, loaded[1], KEYS)


def test_a_rank_that_is_not_the_config_s_is_named(loaded, tmp_path):
    save_adapter(tmp_path, random_lora(loaded[1]), KEYS, base="", task_type="CAUSAL_LM")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    with pytest.raises(WeightMismatch, match=r"self_attn\.q_proj.*\(4, 48\).*\(5, 48\)"):
        load_adapter(tmp_path, loaded[1], KEYS)


def test_dropouts_that_differ_cannot_be_saved(loaded, tmp_path):
    groups = (LoraGroup(".*/query", 2, 2.0), LoraGroup(".*/key", 2, 2.0, dropout=0.1))
    with pytest.raises(ValueError, match=r"\[0\.0, 0\.1\]"):
        save_adapter(tmp_path, random_lora(loaded[1], groups), KEYS, base="", task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((LoraGroup("stack/block_0/attention/querry", 2, 2.0),), "stack/block_0/attention/query'"),
        ((LoraGroup("head|table", 2, 2.0),), "Embedding tables"),
        ((LoraGroup(".*/query", 2, 2.0), LoraGroup(".*_0/.*/query", 4, 2.0)), "take all layers"),
        ((LoraGroup(".*/query", 0, 2.0),), "rank of at least 1"),
        ((LoraGroup(".*/query", 2, 2.0, dropout=1.0),), "dropout in"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused(loaded, groups, message):
    with pytest.raises(ValueError, match=message):
        lora_lib.init(jax.random.key(0), loaded[1], groups)


def dequantized(params):
    if "kernel_scale" in params:
        others = {k: x for k, x in params.items() if k != "kernel_scale"}
        return others | {"kernel": params["kernel"].astype(jnp.float32) * params["kernel_scale"]}
    return {k: dequantized(x) if isinstance(x, dict) else x for k, x in params.items()}


def test_int8_kernels_are_off_by_half_a_step_at_most(loaded):
    model, params = loaded
    small = lora_lib.quantize(params, ".*")
    before, stored, after = map(lora_lib.dense_kernels, (params, small, dequantized(small)))
    assert {x.dtype for x in stored.values()} == {jnp.dtype(jnp.int8)}
    for path, kernel in before.items():
        step = np.abs(kernel).max(axis=0) / 127
        assert np.all(np.abs(after[path] - kernel) <= 0.5001 * step), path  # Some for rounding.
    assert distance(logits(model, small), logits(model, dequantized(small))) < 1e-5


def test_an_int8_base_carries_adapters_and_trains_them(loaded):
    model, params = loaded
    small, lora = lora_lib.quantize(params, r".*/attention/.*"), random_lora(params)
    expected = logits(model, lora_lib.merge(dequantized(small), lora))
    assert distance(logits(model, small, lora), expected) < 1e-5
    gradient = jax.jit(jax.grad(lambda lora: jnp.mean(logits(model, small, lora) ** 2)))(lora)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="merge before"):
        lora_lib.merge(small, lora)
    with pytest.raises(ValueError, match="int8 already"):
        lora_lib.quantize(small, ".*")


def test_an_int8_column_of_zeros_stays_zero():
    params = {"layer": {"kernel": jnp.zeros((3, 2)), "bias": jnp.ones(2)}}
    small = lora_lib.quantize(params, "layer")["layer"]
    np.testing.assert_array_equal(small["kernel"] * small["kernel_scale"], np.zeros((3, 2)))


def test_the_scale_of_an_int8_kernel_keeps_bfloat16_products_close():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    exact = Dense(8)
    params = exact.init(jax.random.key(0), x)["params"]
    small = lora_lib.quantize({"dense": params}, "dense")["dense"]
    y = Dense(8, jnp.bfloat16).apply({"params": small}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact.apply({"params": params}, x), atol=0.05)


def test_a_split_trains_its_first_half_and_joins_to_the_whole(loaded):
    model, params = loaded
    variables = {"params": params, "lora": random_lora(params)}
    trainable, frozen = lora_lib.split(variables, r"lora/.*|params/stack/block_1/mlp_in/kernel")
    assert len(jax.tree.leaves(trainable)) == 2 * (2 * 2 + 3) + 1
    whole = lora_lib.join(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, whole, variables)

    def loss(trainable):
        v = lora_lib.join(trainable, frozen)
        return jnp.mean(logits(model, v["params"], v["lora"]) ** 2)

    optimizer = optax.adam(1e-2)
    state = optimizer.init(trainable)
    gradient = jax.jit(jax.grad(loss))(trainable)
    updates, _ = optimizer.update(gradient, state, trainable)
    moved = optax.apply_updates(trainable, updates)
    for before, after in zip(*map(jax.tree.leaves, (trainable, moved)), strict=True):
        assert jnp.any(before != after)


def test_a_split_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(ValueError, match="'b/kernel'"):
        lora_lib.split({"a": {"kernel": 1.0}, "b": {"kernel": 2.0}}, "b/kernels")


def test_a_control_policy_takes_adapters_and_int8():
    rng = np.random.default_rng(0)
    observation = {
        "instruction": {"tokens": jnp.ones((2, 3), jnp.int32), "mask": jnp.ones((2, 3), bool)},
        "pixels": jnp.asarray(rng.integers(0, 256, (2, 16, 16, 3)), jnp.uint8),
        "proprio": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32),
    }
    model = MultimodalPolicy(kind="continuous", actions=2, vocabulary=5, width=16)
    params = jax.jit(model.init)(jax.random.key(0), observation)["params"]
    lora = random_lora(params, (LoraGroup(r".*", 2, 2.0),))
    small = lora_lib.quantize(params, ".*")
    value = jax.jit(lambda variables: model.apply(variables, observation).value)
    plain, adapted = value({"params": params}), value({"params": params, "lora": lora})
    np.testing.assert_allclose(adapted, value({"params": lora_lib.merge(params, lora)}), rtol=1e-4)
    np.testing.assert_allclose(
        value({"params": small}), value({"params": dequantized(small)}), rtol=1e-4
    )
    assert np.max(np.abs(adapted - plain)) > 0.01
