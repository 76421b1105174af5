"""Tiny models in the Hugging Face format, written with transformers and torch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mmrl_jax.rollouts import generate as gen


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
    """Randomizes and saves the model; returns it in evaluation mode."""
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


def generation_error(model, variables, tokens, present, images, positions=None) -> float:
    """Largest difference of sampled log-probs from those of a full pass over prompt and answer.

    Two answers of four tokens to each prompt; `positions` maps (tokens, present) to those of the
    full pass, and is None where they are counted.
    """
    key, place = jax.random.key(1), None if positions is None else positions(tokens, present)
    tokens, present = jnp.asarray(tokens), jnp.asarray(present)

    @jax.jit
    def generate(variables, tokens, present, images, place):
        prompt = gen.image_prompt(model, variables, tokens, present, images, place)
        within = gen.language(model, variables)
        return gen.generate(
            *within, prompt, key, num_completions=2, max_new_tokens=4, sampling=gen.Sampling()
        )

    with jax.default_matmul_precision("highest"):
        generated = generate(variables, tokens, present, images, place)
        assert not np.any(generated.tokens == model.image_token)  # It would want an image.
        errors = []
        for g in range(2):
            whole = jnp.concatenate([tokens, generated.tokens[:, g]], axis=1)
            there = jnp.concatenate([present, jnp.ones_like(generated.mask[:, g])], axis=1)
            place = None if positions is None else positions(np.asarray(whole), np.asarray(there))
            # All of the prompt, and not only its images, may be read in both directions.
            prompt = (jnp.arange(whole.shape[1]) < tokens.shape[1]) & there
            logits = jax.jit(model.apply)(variables, whole, there, images, place, prompt)
            last = tokens.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
            before = jnp.concatenate(
                [
                    last[:, None],
                    jnp.arange(tokens.shape[1], whole.shape[1] - 1)[None].repeat(len(last), 0),
                ],
                axis=1,
            )
            log_probs = jax.nn.log_softmax(jnp.take_along_axis(logits, before[..., None], axis=1))
            taken = jnp.take_along_axis(log_probs, generated.tokens[:, g, :, None], axis=2)[..., 0]
            errors.append(np.abs(taken - generated.log_probs[:, g]).max())
    return float(max(errors))
