"""Tiny models in the hub's format, written with transformers and torch."""

import pathlib

import numpy as np
import torch


def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every parameter anew, for fresh ones hide swapped tensors: biases 0, norms 1.

    Matrices and biases get a standard deviation of about 0.3, scales of norms are around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = "Gemma" in type(model).__name__  # Its norms scale by 1 + weight.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(0.2 * noise + (not offset) if is_scale else 0.3 * noise)


def save(model: torch.nn.Module, directory: pathlib.Path, seed: int = 0) -> torch.nn.Module:
    """Redraws and saves the model; returns it, ready to be run."""
    redraw(model, seed)
    model.save_pretrained(directory, safe_serialization=True)
    return model.eval()


def error(ours: np.ndarray, theirs: torch.Tensor | np.ndarray, where: np.ndarray) -> float:
    """max|a - b| / max|b| over the tokens `where` [B, S] holds."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs)[where].max() / np.abs(theirs[where]).max())


def compare_greedy(ours: np.ndarray, theirs: np.ndarray, logits: torch.Tensor) -> None:
    """Asserts that tokens [B, T] agree, up to a first difference where the two best are level.

    `logits` [B, T, V] are theirs; what comes after such a difference is not compared.
    """
    best = torch.topk(logits.float(), 2, dim=-1).values
    gap = (best[..., 0] - best[..., 1]).numpy()
    for b in np.flatnonzero(np.any(ours != theirs, axis=1)):
        t = int(np.argmax(ours[b] != theirs[b]))
        print(f"answer {b} differs first at token {t}, where the gap is {gap[b, t]:.2g}")
        assert gap[b, t] < 1e-4, (b, t, gap[b, t], ours[b], theirs[b])
