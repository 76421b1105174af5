"""Tests of what the loop over tokens holds: shards and few bits, not whole wide matrices."""

import re

import jax
import jax.numpy as jnp
import pytest

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.models import lora
from mmrl_jax.models.language import LanguageModel, Rope
from mmrl_jax.models.transformer import BlockSpec
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks.prompts import Prompt

MODEL = LanguageModel(
    vocabulary=64,
    width=32,
    layers=2,
    block=BlockSpec(heads=2, hidden=48, norm="rms", gated=True),
    ropes=(Rope(100.0, 16),),
)


def carried(*, fsdp, int8=False, gather_for_sampling=False):
    """Returns the types of the arrays that the loop over tokens carries in the compiled program."""
    mesh = mesh_lib.make_mesh(fsdp, {"data": 1, "fsdp": fsdp, "tensor": 1})
    tokens = jnp.ones((4, 8), jnp.int32)

    def init(key):
        params = MODEL.init(key, tokens, tokens > 0)["params"]
        return {"params": lora.quantize(params, ".*") if int8 else params}

    shapes = jax.eval_shape(init, jax.random.key(0))
    variables = mesh_lib.placed_shapes(shapes, partition.shardings(shapes, mesh))
    prompts = Prompt(tokens, tokens > 0, None, *[tokens[:, 0]] * 4)
    policy = TokenPolicy(MODEL, 8, (0,), 1, mesh=mesh, gather_for_sampling=gather_for_sampling)

    def generate(variables, key):
        nothing = jax.tree.map(lambda _: None, variables)
        return policy.generate(
            variables, nothing, prompts, key, num_completions=2, sampling=Sampling()
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    text = jax.jit(generate).lower(variables, key).compile().as_text()
    loops = re.findall(r"= \((.*?)\) while\(", text)
    return set(re.findall(r"[a-z]+\d*\[[\d,]*\]", max(loops, key=len)))


@pytest.mark.parametrize(
    ("options", "held", "absent"),
    [
        ({"fsdp": 4}, "f32[8,48]", "f32[32,48]"),
        ({"fsdp": 4, "gather_for_sampling": True}, "f32[32,48]", "f32[8,48]"),
        ({"fsdp": 1, "int8": True}, "s8[32,48]", "f32[32,48]"),
        ({"fsdp": 4, "int8": True}, "s8[8,48]", "s8[32,48]"),
    ],
    ids=str,
)
def test_matrices_are_gathered_and_widened_where_they_are_used(options, held, absent):
    types = carried(**options)
    assert held in types and absent not in types, types
