"""Greedy tokens per second of SmolLM2-135M, compared with transformers' `generate` in torch.

Both sides use the same weights, prompts and numbers of tokens in float32. The peer uses the fastest
of its settings on this machine. The tokens of both are compared.
"""

from collections.abc import Iterator
import functools
import itertools
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.harness import Row, compare, rate
from mmrl_jax.pretrained import bundled_weights, hub
from mmrl_jax.rollouts import generate as gen

PROMPTS = (
    "What is the capital of France?",
    "Name three colours and say where one sees them.",
    "What is 2 + 3?",
    "Write a short poem about the sea.",
    "What do bees make, and why?",
)
BATCHES = (1, 8, 32)
LENGTH = 64
# Settings of the peer.
PEERS: dict[str, dict[str, Any]] = {
    "growing cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, compiled": {"cache_implementation": "static"},
}


def rows(runs: int) -> Iterator[Row]:
    """Measures one batch size after another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = bundled_weights.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch_model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch_model.generation_config.eos_token_id = None  # Both sides generate LENGTH tokens.
    model, variables, _ = hub.load_language_model(directory)
    for batch in BATCHES:
        ids, mask = prompts(tokenizer, batch)
        ours = functools.partial(generate(model), variables, ids, mask, jax.random.key(0))
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        peer, name = fastest(torch_model, inputs)
        peer_tokens = peer()[:, ids.shape[1] :].numpy()
        equal = np.mean(np.all(peer_tokens == np.asarray(ours().tokens[:, 0]), axis=1))
        yield compare(
            f"batch {batch} / torch, {name}; {equal:.0%} of completions equal",
            rate(batch * LENGTH, ours),
            rate(batch * LENGTH, peer),
            unit="tokens/s",
            runs=runs,
        )


def prompts(tokenizer: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids [batch, S], padded on the left, and their mask [batch, S]."""
    cycled = itertools.islice(itertools.cycle(PROMPTS), batch)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in cycled
    ]
    inputs = tokenizer(texts, return_tensors="np", padding=True, padding_side="left")
    return inputs["input_ids"], inputs["attention_mask"].astype(bool)


def generate(model: Any) -> jax.stages.Wrapped:
    """Returns a jitted function (variables, ids, mask, rng) -> LENGTH greedy tokens each."""

    @jax.jit
    def program(variables: Any, ids: jax.Array, mask: jax.Array, rng: jax.Array) -> gen.Completions:
        prompt = gen.text_prompt(model, variables, ids, mask)
        sampling = gen.Sampling(temperature=0.0)
        return gen.generate(
            model,
            variables,
            prompt,
            rng,
            num_completions=1,
            max_new_tokens=LENGTH,
            sampling=sampling,
        )

    return program


def fastest(model: Any, inputs: Any) -> tuple[Any, str]:
    """Returns the peer's call in the fastest setting that runs on this machine, and its name.

    Each setting is measured once, after a call to warm up.
    """
    import torch

    def call(options: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, **options)

    durations: dict[str, float] = {}
    for name, options in PEERS.items():
        try:
            call(options)
        except Exception as error:  # The exception type depends on which compiler is missing.
            print(f"  torch, {name}: not run, {type(error).__name__}")
            continue
        start = time.perf_counter()
        call(options)
        durations[name] = time.perf_counter() - start
        print(f"  torch, {name}: {durations[name]:.2f} s")
    best = min(durations, key=lambda name: durations[name])
    return functools.partial(call, PEERS[best]), best
