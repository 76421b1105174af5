"""Compiles RL updates of published models for TPUs that are not present, and reports their memory.

  pip install "jax[tpu]==$(python -c 'import jax; print(jax.__version__)')"
  python -m experiments.large_models [--cases=qwen2_5_vl_7b/lora/v5e-8]

The TPU's own compiler compiles one whole update for the devices of a topology, from shapes alone:
neither the weights nor a TPU are needed. An update of a vision-language model samples 8 completions
of 256 tokens for each of 8 prompts with two images per 8 chips, and takes one optimizer step of
GRPO. An update of the control policy is that of `reach_ppo` with the widths of ViT-B.

Writes experiments/results/large_models/<case>.json with

  arguments, temporaries, needed    gigabytes a chip; donated buffers count once
  collectives                       number and gigabytes of the results of each kind, in loops once
  largest_gather, largest_array     gigabytes of the largest gathered and of the largest array
  parameters, compile_s             number of parameters, seconds of the compilation

The configs in experiments/published are those of the models on the Hugging Face Hub.
"""

from collections.abc import Callable
import functools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
from typing import Any, NamedTuple

from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import partition
from mmrl_jax.learners import grpo, optimizers, token_learner
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenPolicy, TokenState
from mmrl_jax.models import lora, stacked
from mmrl_jax.models.qwen_vision import PatchImages
from mmrl_jax.models.tiles import Tiles
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.pretrained import blueprints, hub
from mmrl_jax.reporting.summary import write_json
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.training import loop
from mmrl_jax.types import Metrics

FLAGS = flags.FLAGS
CONFIGS = pathlib.Path(__file__).parent / "published"
RESULTS = pathlib.Path(__file__).parent / "results" / "large_models"
CHIP_BYTES = 16e9  # Memory of a TPU v5e chip.
TOPOLOGIES = {"v5e-8": "v5e:2x4", "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16"}
PROMPTS, COMPLETIONS, TOKENS, WORDS, IMAGES = 8, 8, 256, 64, 2
# Features of an image in a prompt. Qwen2.5-VL: 448 x 448 pixels, 14 x 14 a patch, 2 x 2 merged.
QWEN_PATCHES, QWEN_MERGE = 32, 2
ADAPTERS = [lora.LoraGroup(r"language/.*", rank=16, alpha=32.0)]


class Case(NamedTuple):
    """One update to compile.

    Attributes:
      model: Name of a config in experiments/published, or 'vit_b' for the control policy.
      method: 'lora' for adapters on a frozen base in bfloat16, 'lora_int8' for one in int8, 'full'
        for all parameters in float32, or 'ppo'.
      topology: Name of the topology, one of TOPOLOGIES.
      mesh: Sizes of the axes of the mesh that are above 1.
    """

    model: str
    method: str
    topology: str
    mesh: dict[str, int]

    @property
    def name(self) -> str:
        """Returns the name of the case, for example 'qwen2_5_vl_7b/lora/v5e-8'."""
        return f"{self.model}/{self.method}/{self.topology}"


CASES = (
    Case("smolvlm_256m", "full", "v5e-8", {"data": 8}),
    Case("smolvlm_256m", "lora", "v5e-8", {"data": 8}),
    Case("smolvlm_2_2b", "full", "v5e-8", {"fsdp": 8}),
    Case("smolvlm_2_2b", "lora", "v5e-8", {"fsdp": 8}),
    Case("paligemma_3b", "full", "v5e-8", {"fsdp": 8}),
    Case("paligemma_3b", "lora", "v5e-8", {"fsdp": 8}),
    Case("qwen2_5_vl_7b", "lora", "v5e-8", {"fsdp": 8}),
    Case("qwen2_5_vl_7b", "lora_int8", "v5e-8", {"fsdp": 8}),
    Case("qwen2_5_vl_7b", "full", "v5e-64", {"fsdp": 64}),
    Case("vit_b", "ppo", "v5e-8", {"data": 8}),
    Case("vit_b", "ppo", "v5e-256", {"data": 256}),
)


def read_model(name: str) -> VisionLanguageModel:
    """Returns the model of a published config, in bfloat16 with recomputation and scanned blocks.

    Args:
      name: Name of the config in experiments/published.
    """
    with tempfile.TemporaryDirectory() as directory:
        shutil.copyfile(CONFIGS / f"{name}.json", pathlib.Path(directory) / "config.json")
        config = hub.read_config(directory)
    plan = blueprints.make("vision_language_model", config, (), dtype=jnp.bfloat16, remat=True)
    model = stacked.with_scan(plan.model, True)
    assert isinstance(model, VisionLanguageModel)
    return model


def prompt_shapes(model: VisionLanguageModel, count: int) -> tuple[Prompt, Any]:
    """Returns the shapes of prompts with two images, and the function that gives positions.

    Args:
      model: Model.
      count: Number of prompts.
    """
    ints, bools = (functools.partial(jax.ShapeDtypeStruct, dtype=x) for x in (jnp.int32, jnp.bool_))
    images: Any
    if any(rope.sections for rope in model.language.ropes):
        patches = IMAGES * QWEN_PATCHES**2
        pixels = jax.ShapeDtypeStruct((count, patches, 2 * 14 * 14 * 3), jnp.bfloat16)
        images = PatchImages(pixels, *(ints((count, patches)) for _ in range(3)))
        features = patches // QWEN_MERGE**2

        def positions(tokens: jax.Array, mask: jax.Array) -> jax.Array:
            flat = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            return jnp.repeat(flat[:, None], 3, axis=1)

    else:
        vision: Any = model.vision
        edge = vision.tower.patch * math.isqrt(vision.tower.patches)
        pixels = jax.ShapeDtypeStruct((count, IMAGES, edge, edge, 3), jnp.bfloat16)
        images, positions = Tiles(pixels, bools((count, IMAGES))), None
        features = IMAGES * vision.features_per_tile()
    shape = (count, features + WORDS)
    empty = ints((count,))
    return Prompt(ints(shape), bools(shape), images, empty, empty, empty, empty), positions


def vlm_update(case: Case, mesh: Mesh) -> tuple[Callable, tuple[Any, ...], int]:
    """Returns an update of GRPO, the shapes of its arguments on a mesh, and the parameter count.

    Args:
      case: Case to compile.
      mesh: Mesh of described devices.
    """
    model = read_model(case.model)
    prompts, positions = prompt_shapes(model, PROMPTS * mesh.size // 8)
    policy = TokenPolicy(model, TOKENS, (0,), 1, positions=positions, mesh=mesh)
    options = grpo.GRPO(num_minibatches=1)
    optimizer = optimizers.make(optimizers.OptimizerOptions(), 100).transformation
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), prompts)

    def init(key: jax.Array, prompts: Prompt) -> dict[str, Any]:
        params = stacked.with_scan(model, False).init(key, *policy.inputs(prompts))["params"]
        if case.method == "full":
            return stacked.stack({"params": params}, model)
        adapters = lora.init(key, params, ADAPTERS)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        if case.method == "lora_int8":
            params = lora.quantize(params, ".*")
        return stacked.stack({"params": params, "lora": adapters}, model)

    shapes = jax.eval_shape(init, jax.random.key(0), one)
    trained, frozen = lora.split(shapes, ".*" if case.method == "full" else "lora/.*")
    state = jax.eval_shape(
        functools.partial(token_learner.init, optimizer=optimizer, with_reference=False), trained
    )

    def update(
        state: TokenState, frozen: Any, prompts: Prompt, key: jax.Array
    ) -> tuple[TokenState, Metrics]:
        sample_key, learn_key = jax.random.split(key)
        completions = policy.generate(
            state.params,
            frozen,
            prompts,
            sample_key,
            num_completions=COMPLETIONS,
            sampling=Sampling(),
        )
        # Any function of the tokens stands for a verifiable reward.
        reward = jnp.mean(completions.tokens % 2 == 0, axis=-1, dtype=jnp.float32)
        return grpo.update(
            state,
            frozen,
            ScoredCompletions.single_turn(prompts, completions, reward, jnp.ones_like(reward)),
            learn_key,
            policy=policy,
            optimizer=optimizer,
            options=options,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )

    placed = mesh_lib.placed_shapes
    state_shardings = partition.shardings(state, mesh)
    arguments = (
        placed(state, state_shardings),
        placed(frozen, partition.shardings(frozen, mesh)),
        placed(prompts, mesh_lib.batch_sharding(mesh, 0)),
        placed(jax.eval_shape(lambda: jax.random.key(0)), mesh_lib.replicated(mesh)),
    )
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(state_shardings, None))
    return jitted, arguments, sum(x.size for x in jax.tree.leaves(shapes["params"]))


def control_update(case: Case) -> tuple[Callable, tuple[Any, ...], int]:
    """Returns an update of PPO with a policy of ViT-B's widths, see `vlm_update`."""
    changes = {
        "stages": ("ppo",),
        "mesh": case.mesh,
        "model": {
            "width": 768,
            "heads": 12,
            "layers": 12,
            "mlp_ratio": 4,
            "dtype": "bfloat16",
            "remat": True,
        },
        "ppo": {"num_envs": 4096},
    }
    problem = problems.make(mmrl_jax.get_config("reach_ppo", changes))
    stage = problem.stage("ppo")
    shapes = jax.eval_shape(stage.init)
    shardings = stage.shardings(shapes)
    dispatch = loop.make_dispatch(stage.update, 1, shardings)
    carry = mesh_lib.placed_shapes(shapes, shardings)
    count = sum(x.size for x in jax.tree.leaves(shapes.learner.params))
    return dispatch, (carry, stage.constants), count


ITEM_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<name>all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast)(-start)?\("
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)]")


def nbytes(dtype: str, sizes: str) -> int:
    """Returns the bytes of an array as a program's text writes it, e.g. ('f32', '2,3')."""
    return ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)


def collectives(text: str) -> list[tuple[str, int]]:
    """Returns the kind and the bytes of the result of each collective of a program's text."""
    return [
        (match["name"], sum(nbytes(*x) for x in _ARRAY.findall(match["shapes"])))
        for match in map(_COLLECTIVE.search, text.splitlines())
        if match
    ]


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case and returns its row, see the module's docstring.

    Raises:
      ValueError: The program does not fit into the memory of the chips; the message of the compiler
        says by how much.
    """
    topology = topologies.get_topology_desc(TOPOLOGIES[case.topology], platform="tpu")
    devices = np.array(topology.devices).reshape(-1)
    sizes = {axis: case.mesh.get(axis, 1) for axis in mesh_lib.AXES}
    with mesh_lib.described_devices(devices):
        if case.model == "vit_b":
            update, arguments, parameters = control_update(case)
        else:
            mesh = mesh_lib.make_mesh(None, sizes)
            update, arguments, parameters = vlm_update(case, mesh)
        started = time.perf_counter()
        compiled = update.lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found, kinds = collectives(text), {}
    for kind, size in found:
        count, total = kinds.get(kind, (0, 0.0))
        kinds[kind] = (count + 1, total + size / 1e9)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "case": case.name,
        "mesh": sizes,
        "parameters": parameters,
        "arguments": memory.argument_size_in_bytes / 1e9,
        "temporaries": memory.temp_size_in_bytes / 1e9,
        "needed": (memory.argument_size_in_bytes + memory.temp_size_in_bytes + new) / 1e9,
        "collectives": kinds,
        "largest_gather": max((s for k, s in found if k == "all-gather"), default=0) / 1e9,
        "largest_array": max(nbytes(*x) for x in _ARRAY.findall(text)) / 1e9,
        "compile_s": time.perf_counter() - started,
        "libtpu": _libtpu_version(),
    }


def _libtpu_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("libtpu")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    # A program from the cache would have a compilation time of nearly zero.
    jax.config.update("jax_enable_compilation_cache", False)
    with clean_exit(ValueError):
        cases = {case.name: case for case in CASES}
        if unknown := [name for name in FLAGS.cases if name not in cases]:
            raise ValueError(f"--cases={unknown}: the cases are {list(cases)}.")
    # While one process compiles, others may use the library too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for name in FLAGS.cases or cases:
        row = measure(cases[name])
        path = pathlib.Path(FLAGS.directory) / f"{name.replace('/', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, row)
        print(
            f"{name:32} {row['needed']:6.2f} GB a chip, compiled in {row['compile_s']:,.0f} s; "
            f"{json.dumps(row['collectives'])}",
            flush=True,
        )


if __name__ == "__main__":
    flags.DEFINE_list("cases", [], "Names of the cases to compile; by default all.")
    flags.DEFINE_string("directory", str(RESULTS), "Directory of the results.")
    run_command(main)
