"""GRPO updates per second of text-only models, compared with TRL's `GRPOTrainer` in torch.

An update samples a group of completions for each prompt, scores them, and takes one AdamW step.
Both sides use the same weights, prompts, numbers of completions and tokens, rewards, loss and
optimizer in float32. The peer uses a single batch, its default cache of keys and values (a static
cache is not faster), and no recomputation. Losses and gradients of both sides are compared on the
same completions.
"""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.generate import PROMPTS, prompts
from experiments.benchmarks.harness import Row, alternate, row
from mmrl_jax.learners import grpo, token_learner
from mmrl_jax.learners.token_learner import ScoredCompletions
from mmrl_jax.models.lora import split
from mmrl_jax.pretrained import bundled_weights, hub
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks.prompts import Prompt

GROUP = 8
LLAMA_17M = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
}  # fmt: skip
LEARNING_RATE, MAX_GRAD_NORM = 1e-6, 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and the size of its updates.

    Attributes:
      name: Name of the model.
      directory: Directory of the model in the Hugging Face format.
      num_prompts: Number of prompts B in an update.
      length: Number of tokens T of each completion.
    """

    name: str
    directory: pathlib.Path
    num_prompts: int
    length: int


def rows(runs: int) -> Iterator[Row]:
    """Measures one model after another."""
    # By default torch's threads spin while they wait, which makes it many times slower on a shared
    # machine. Torch reads this variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as directory:
        for job in jobs(pathlib.Path(directory)):
            yield from rows_of(job, runs)


def jobs(directory: pathlib.Path) -> tuple[Job, ...]:
    """Returns the jobs. Models that are in no package are written to `directory`."""
    return (
        Job("Llama of 17M", random_llama(directory, **LLAMA_17M), num_prompts=4, length=32),
        Job("SmolLM2-135M", bundled_weights.smollm2(), num_prompts=1, length=64),
    )


def rows_of(job: Job, runs: int) -> Iterator[Row]:
    """Measures the update, its generation and learning, its processor time, and its memory."""
    name = f"{job.name}, {job.num_prompts} x {GROUP} completions of {job.length} / TRL"
    ours, peer = timed_updates(job, runs)
    for stage in ours[0]:
        rates = ([1 / durations[stage] for durations in side] for side in (ours, peer))
        yield row(f"{name}: {stage}", *rates, unit="1/s")
    memory = ([in_new_process(side, job)] for side in (Ours, Peer))
    yield row(f"{name}: peak memory", *memory, unit="MB")


def timed_updates(job: Job, runs: int) -> list[list[dict[str, float]]]:
    """Returns the seconds of each part of an update by its name, for our and the peer's updates."""
    ours, peer = Ours(job), Peer(job)
    check(ours, peer)

    def timed(side: Ours | Peer) -> dict[str, float]:
        processors, start = time.process_time(), time.perf_counter()
        batch = jax.block_until_ready(side.generate())
        middle = time.perf_counter()
        jax.block_until_ready(side.learn(batch))
        end = time.perf_counter()
        return {
            "update": end - start,
            "generation": middle - start,
            "learning": end - middle,
            "update, of processor time": time.process_time() - processors,
        }

    return alternate([functools.partial(timed, side) for side in (ours, peer)], runs)


def random_llama(directory: pathlib.Path, **sizes: int) -> pathlib.Path:
    """Writes a Llama with random parameters and the tokenizer of SmolLM2.

    Args:
      directory: Directory to write, which is returned.
      **sizes: Sizes of the model, see `transformers.LlamaConfig`.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled_weights.smollm2())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Ours:
    """GRPO of this library.

    Attributes:
      state: Parameters and optimizer state.
      prompts: Batch of B prompts.
    """

    def __init__(self, job: Job):
        from transformers import AutoTokenizer

        model, variables, _ = hub.load_language_model(job.directory)
        params, self._frozen = split(variables, ".*")
        tokenizer = AutoTokenizer.from_pretrained(job.directory)
        tokens, mask = map(jnp.asarray, prompts(tokenizer, job.num_prompts))
        unused = jnp.zeros(job.num_prompts, jnp.int32)
        self.prompts = Prompt(tokens, mask, None, *(unused,) * 4)
        # No token has the stop id, so that every completion has its full length.
        policy = token_learner.TokenPolicy(
            model, max_new_tokens=job.length, stop=(model.vocabulary,), pad=tokenizer.pad_token_id
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0)
        )
        self.state = token_learner.init(params, optimizer=optimizer, with_reference=False)
        self._keys = iter(jax.random.split(jax.random.key(0), 10_000))
        self._generate = jax.jit(
            functools.partial(
                policy.generate, num_completions=GROUP, sampling=Sampling(temperature=1.0)
            )
        )
        self._update = jax.jit(
            functools.partial(
                grpo.update,
                policy=policy,
                optimizer=optimizer,
                options=grpo.GRPO(
                    preset="grpo", num_epochs=1, num_minibatches=1, grad_accum_steps=1
                ),
            ),
            donate_argnums=0,
        )

    def generate(self) -> ScoredCompletions:
        """Samples completions and scores them."""
        completions = self._generate(
            self.state.params, self._frozen, self.prompts, next(self._keys)
        )
        return self.experience(completions)

    def experience(self, completions: Completions) -> ScoredCompletions:
        """Scores completions by the fraction of their tokens that are even."""
        reward = jnp.mean(completions.tokens % 2 == 0, axis=-1, dtype=jnp.float32)
        return ScoredCompletions.single_turn(
            self.prompts, completions, reward, jnp.ones_like(reward)
        )

    def learn(self, experience: ScoredCompletions) -> dict[str, jax.Array]:
        """Takes an optimizer step and returns its metrics."""
        self.state, metrics = self._update(self.state, self._frozen, experience, next(self._keys))
        return metrics

    def update(self) -> dict[str, jax.Array]:
        """Generates completions and learns from them."""
        return self.learn(self.generate())


class Peer:
    """TRL's trainer, whose methods are called one by one.

    Attributes:
      trainer: The trainer.
    """

    def __init__(self, job: Job):
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        messages = [[{"role": "user", "content": text}] for text in PROMPTS[: job.num_prompts]]
        config = GRPOConfig(
            output_dir=tempfile.gettempdir(),  # Nothing is saved.
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            per_device_train_batch_size=job.num_prompts * GROUP,
            num_generations=GROUP,
            max_completion_length=job.length,
            generation_kwargs={"min_new_tokens": job.length},
            num_iterations=1,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
        )
        self.trainer = GRPOTrainer(
            model=str(job.directory),
            reward_funcs=even,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": messages}),
            processing_class=AutoTokenizer.from_pretrained(job.directory),
        )
        # The padding token also ends messages. With a padding index, torch would not compute the
        # gradient of its embedding.
        self.trainer.model.get_input_embeddings().padding_idx = None
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self._prompts = [{"prompt": prompt} for prompt in messages for _ in range(GROUP)]

    def generate(self) -> dict[str, Any]:
        """Samples completions and scores them."""
        return self.trainer._generate_and_score_completions(self._prompts)

    def learn(self, batch: dict[str, Any]) -> dict[str, float]:
        """Takes an optimizer step and returns its loss and gradient norm."""
        trainer = self.trainer
        loss = trainer.compute_loss(trainer.model, batch)
        trainer.accelerator.backward(loss)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {"loss/policy": loss.item(), "grad/norm": float(norm)}

    def update(self) -> dict[str, float]:
        """Generates completions and learns from them."""
        return self.learn(self.generate())


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns the fraction of the tokens of each completion that are even, as rewards."""
    return [float(np.mean(np.asarray(ids) % 2 == 0)) for ids in completion_ids]


def check(ours: Ours, peer: Peer) -> None:
    """Takes one optimizer step of both sides on the peer's completions, and compares them.

    Raises:
      AssertionError: If prompts, sizes, rewards, losses or gradients differ.
    """
    peer_batch, our_batch = peer.generate(), ours.generate()
    # The completions have a single turn.
    sampled: Completions = jax.tree.map(lambda x: x[0], our_batch.completions)
    shape = sampled.tokens.shape
    assert bool(sampled.mask.all()) and bool(peer_batch["completion_mask"].all())
    assert peer_batch["completion_ids"].shape == (shape[0] * shape[1], shape[2])
    for peer_array, our_array in (
        (peer_batch["prompt_ids"], ours.prompts.tokens),
        (peer_batch["prompt_mask"], ours.prompts.mask),
    ):
        np.testing.assert_array_equal(peer_array, np.repeat(np.asarray(our_array), GROUP, axis=0))
    completions = sampled._replace(
        tokens=jnp.asarray(peer_batch["completion_ids"].numpy(), jnp.int32).reshape(shape)
    )
    # A single step is on-policy: the ratios are 1 and the advantages of a group add up to 0, so
    # that the loss is 0, and only the gradients can differ.
    expected = peer.learn(peer_batch | {"old_per_token_logps": None})
    actual = ours.learn(ours.experience(completions))
    assert expected["grad/norm"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(float(actual[name]), value, rtol=2e-3, atol=1e-6, err_msg=name)
    print("  of one step, ours / TRL:", {k: (float(actual[k]), v) for k, v in expected.items()})


def in_new_process(side: type[Ours] | type[Peer], job: Job) -> float:
    """Returns the peak memory in MB of updates after the first, measured in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, side, job).result()


def peak_memory(side: type[Ours] | type[Peer], job: Job) -> float:
    """Returns the peak memory in MB of this process in updates after the first."""
    learner = side(job)
    jax.block_until_ready(learner.update())
    process = pathlib.Path("/proc/self")
    (process / "clear_refs").write_text("5", encoding="utf-8")  # Resets the peak.
    for _ in range(2):
        jax.block_until_ready(learner.update())
    status = (process / "status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 1e3
