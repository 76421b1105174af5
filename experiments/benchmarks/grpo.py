"""GRPO updates a second of text-only models, against TRL's `GRPOTrainer` in torch.

An update draws a group of answers to each question, scores them, and takes one AdamW step. Both
sides have the same weights, questions, numbers of answers and of tokens, rewards, loss and
optimizer, float32; the peer one batch for everything, its cache of keys and values (a static one
is no faster here), and no recomputation. On the same answers, losses and gradients of both are
compared.
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
LEARNING_RATE, MAX_GRAD_NORM = 1e-6, 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is learned.

    Attributes:
      name: of the model.
      directory: its weights, in the hub's format.
      num_prompts: B, of an update.
      length: T, tokens of every answer.
    """

    name: str
    directory: pathlib.Path
    num_prompts: int
    length: int


def rows(runs: int) -> Iterator[Row]:
    """Measures one model after another."""
    # Torch's threads else spin while they wait, for which it is many times slower where other
    # work runs beside it. It reads this as it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as directory:
        for job in jobs(pathlib.Path(directory)):
            yield from rows_of(job, runs)


def jobs(directory: pathlib.Path) -> tuple[Job, ...]:
    """The models that are compared; weights that no package holds are written to a directory."""
    return (
        Job("Llama of 17M", small_llama(directory), num_prompts=4, length=32),
        Job("SmolLM2-135M", bundled_weights.smollm2(), num_prompts=1, length=64),
    )


def rows_of(job: Job, runs: int) -> Iterator[Row]:
    """The whole update, its two stages, what it costs of the processors, and the memory."""
    name = f"{job.name}, {job.num_prompts} x {GROUP} answers of {job.length} / TRL"
    ours, peer = timed_updates(job, runs)
    for stage in ours[0]:
        rates = ([1 / took[stage] for took in side] for side in (ours, peer))
        yield row(f"{name}: {stage}", *rates, unit="1/s")
    memory = ([apart(side, job)] for side in (Ours, Peer))
    yield row(f"{name}: peak memory", *memory, unit="MB")


def timed_updates(job: Job, runs: int) -> list[list[dict[str, float]]]:
    """Stage -> seconds, of each of our and of the peer's updates."""
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


def small_llama(directory: pathlib.Path) -> pathlib.Path:
    """Writes a Llama of 17M random parameters, with the tokenizer of SmolLM2."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled_weights.smollm2())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Ours:
    """One learner of this library.

    Attributes:
      state: its parameters and optimizer.
      prompts: of B samples.
    """

    def __init__(self, job: Job):
        from transformers import AutoTokenizer

        model, variables, _ = hub.load_language_model(job.directory)
        params, self._frozen = split(variables, ".*")
        tokenizer = AutoTokenizer.from_pretrained(job.directory)
        tokens, mask = map(jnp.asarray, prompts(tokenizer, job.num_prompts))
        unused = jnp.zeros(job.num_prompts, jnp.int32)
        self.prompts = Prompt(tokens, mask, None, *(unused,) * 4)
        # No token has this id: every answer has all its tokens.
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
        """Draws answers and scores them."""
        completions = self._generate(
            self.state.params, self._frozen, self.prompts, next(self._keys)
        )
        return self.experience(completions)

    def experience(self, completions: Completions) -> ScoredCompletions:
        """Scores answers by how many of their tokens are even."""
        reward = jnp.mean(completions.tokens % 2 == 0, axis=-1, dtype=jnp.float32)
        return ScoredCompletions.single_turn(
            self.prompts, completions, reward, jnp.ones_like(reward)
        )

    def learn(self, experience: ScoredCompletions) -> dict[str, jax.Array]:
        """Takes the step; returns its metrics."""
        self.state, metrics = self._update(self.state, self._frozen, experience, next(self._keys))
        return metrics

    def update(self) -> dict[str, jax.Array]:
        """Both."""
        return self.learn(self.generate())


class Peer:
    """TRL's trainer, whose own methods are called one by one.

    Attributes:
      trainer: it.
    """

    def __init__(self, job: Job):
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        asked = [[{"role": "user", "content": text}] for text in PROMPTS[: job.num_prompts]]
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
            train_dataset=Dataset.from_dict({"prompt": asked}),
            processing_class=AutoTokenizer.from_pretrained(job.directory),
        )
        # The token of padding ends messages too; torch gives its embedding no gradient otherwise.
        self.trainer.model.get_input_embeddings().padding_idx = None
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self._asked = [{"prompt": prompt} for prompt in asked for _ in range(GROUP)]

    def generate(self) -> dict[str, Any]:
        """Draws answers and scores them."""
        return self.trainer._generate_and_score_completions(self._asked)

    def learn(self, batch: dict[str, Any]) -> dict[str, float]:
        """Takes the step; returns its loss and the norm of its gradient."""
        trainer = self.trainer
        loss = trainer.compute_loss(trainer.model, batch)
        trainer.accelerator.backward(loss)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {"loss/policy": loss.item(), "grad/norm": float(norm)}

    def update(self) -> dict[str, float]:
        """Both."""
        return self.learn(self.generate())


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Rewards of answers: how many of their tokens are even."""
    return [float(np.mean(np.asarray(ids) % 2 == 0)) for ids in completion_ids]


def check(ours: Ours, peer: Peer) -> None:
    """Takes one step of both on the peer's answers.

    Raises:
      AssertionError: prompts, sizes, rewards, losses or gradients are not the same.
    """
    batch, own = peer.generate(), ours.generate()
    drawn: Completions = jax.tree.map(lambda x: x[0], own.completions)  # Of the only turn.
    shape = drawn.tokens.shape
    assert bool(drawn.mask.all()) and bool(batch["completion_mask"].all())
    assert batch["completion_ids"].shape == (shape[0] * shape[1], shape[2])
    for theirs, mine in (
        (batch["prompt_ids"], ours.prompts.tokens),
        (batch["prompt_mask"], ours.prompts.mask),
    ):
        np.testing.assert_array_equal(theirs, np.repeat(np.asarray(mine), GROUP, axis=0))
    completions = drawn._replace(
        tokens=jnp.asarray(batch["completion_ids"].numpy(), jnp.int32).reshape(shape)
    )
    # A single step is on the policy: its ratios are 1 and the advantages of a group add up to 0, so
    # that its loss is 0 and its gradient is what can differ.
    theirs = peer.learn(batch | {"old_per_token_logps": None})
    mine = ours.learn(ours.experience(completions))
    assert theirs["grad/norm"] > 0
    for name, value in theirs.items():
        np.testing.assert_allclose(float(mine[name]), value, rtol=2e-3, atol=1e-6, err_msg=name)
    print("  of one step, ours / TRL:", {k: (float(mine[k]), v) for k, v in theirs.items()})


def apart(side: type[Ours] | type[Peer], job: Job) -> float:
    """The most memory, in MB, that a process of its own has in updates after the first."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, side, job).result()


def peak(side: type[Ours] | type[Peer], job: Job) -> float:
    """The most memory of this process, in MB, in updates after the first."""
    learner = side(job)
    jax.block_until_ready(learner.update())
    process = pathlib.Path("/proc/self")
    (process / "clear_refs").write_text("5", encoding="utf-8")  # Forgets the peak so far.
    for _ in range(2):
        jax.block_until_ready(learner.update())
    status = (process / "status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 1e3
