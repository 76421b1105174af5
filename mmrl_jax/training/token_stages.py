"""How token policies learn: what 'sft', 'rl' and 'ppo' mean in their configs, and their stages."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.learners import dpo, grpo, sft, token_learner, token_ppo
from mmrl_jax.learners.grpo import ScoredCompletions
from mmrl_jax.learners.learner import epoch_indices
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState
from mmrl_jax.rl import group_advantages
from mmrl_jax.rl.overlong import soft_overlong_penalty
from mmrl_jax.rl.token_losses import KLS, PRESETS, TokenLoss
from mmrl_jax.tasks.question import Prompt
from mmrl_jax.training import config as config_lib
from mmrl_jax.training.config import (
    Field,
    anything,
    between,
    non_negative,
    one_of,
    pattern,
    positive,
)
from mmrl_jax.training.factory import adam, run_fields, schedule
from mmrl_jax.training.prefetch import Prefetch
from mmrl_jax.training.stage import Carry, HostUpdate, Stage, Start
from mmrl_jax.training.token_models import TokenModel, make_variables, partition_trainable
from mmrl_jax.types import Metrics, Params, Transition

SFT: config_lib.Schema = {
    "updates": non_negative(int, "optimizer steps of supervised fine-tuning; 0 for none"),
    "batch_size": positive(int, "samples an optimizer step"),
    "trained": pattern(str, "of the paths of variables, params/... or lora/...; others are frozen"),
    "learning_rate": positive(float, "of Adam"),
    "max_grad_norm": positive(float, "global norm that gradients are clipped to"),
    "updates_per_dispatch": positive(int, "updates in one compiled call"),
    "eval_interval": positive(int, "updates between evaluations"),
    "checkpoint_interval": positive(int, "updates between checkpoints"),
}

RL: config_lib.Schema = {
    "temperature": positive(float, "of the answers"),
    "penalty": non_negative(float, "reward that an answer of no meaning loses"),
    "trained": pattern(str, "as sft.trained; the reference has the frozen ones too"),
    "kl": one_of(KLS, "estimator of the KL to the reference, which is where RL began"),
    "kl_weight": non_negative(float, "of it; 0 for none"),
    "reference_decay": between(
        float, 0, 1, "the reference moves to the policy by 1 - decay an update; 1 for not at all"
    ),
    "entropy_weight": non_negative(float, "of the entropy bonus"),
    "max_correction": positive(
        (float, type(None)),
        "largest importance weight where answers are drawn in another precision than learned from",
    ),
    "learning_rate": positive(float, "of Adam, at the start"),
    "schedule": one_of(("constant", "linear"), "of the learning rate; linear falls to 0"),
    "max_grad_norm": positive(float, "global norm that gradients are clipped to"),
    "epochs": positive(int, "passes over a batch"),
    "minibatches": positive(int, "optimizer steps a pass"),
    "accumulate": positive(int, "parts of a minibatch whose gradients are added up"),
}

# Of completions whose length is the policy's to choose, as that of actions is not.
TRUNCATION: config_lib.Schema = {
    "mask_truncated_completions": anything(
        bool,
        "answers without an end are not learned from; with grpo their rewards still count",
    ),
    "overlong_buffer": Field(
        (int, type(None)),
        lambda x: x > 0,
        "greater than 0, or None",
        "last tokens of the most of an answer over which it loses up to 1 of its reward (DAPO)",
    ),
}

PPO: config_lib.Schema = {
    "discount": between(float, 0, 1, "per turn"),
    "gae_lambda": between(float, 0, 1, "of the advantage estimate, per token"),
    "clip": positive(float, "half width of the trust interval of the ratio"),
    "value_clip": positive((float, type(None)), "of the value loss"),
    "value_weight": non_negative(float, "of the value loss"),
}


def check_reference(config: ml_collections.ConfigDict) -> None:
    """Checks that a reference that moves is there.

    Raises:
      ValueError: it moves, but the algorithm and the KL's weight need none.
    """
    if config.rl.reference_decay < 1 and not _has_reference(config):
        raise ValueError(
            f"rl.reference_decay={config.rl.reference_decay}, but rl.kl_weight=0 keeps no "
            "reference that could move; set rl.reference_decay to 1, or raise rl.kl_weight."
        )


def _has_reference(config: ml_collections.ConfigDict) -> bool:
    return config.rl.kl_weight > 0 or config.algorithm == "dpo"


def check_overlong(config: ml_collections.ConfigDict, length: int) -> None:
    """Checks the buffer of answers of up to `length` tokens.

    Raises:
      ValueError: it is longer than these.
    """
    buffer = config.rl.overlong_buffer
    if buffer is not None and buffer > length:
        raise ValueError(
            f"rl.overlong_buffer={buffer} is more than the {length} tokens that an answer may "
            "have; lower it."
        )


def shape_rewards(
    config: ml_collections.ConfigDict, experience: ScoredCompletions
) -> ScoredCompletions:
    """Adds to rewards what the config punishes in the form of the answers, not in their content."""
    buffer, present = config.rl.overlong_buffer, experience.answers.present
    if buffer is None:
        return experience
    penalty = soft_overlong_penalty(
        jnp.sum(present, axis=-1), max_length=present.shape[-1], buffer=buffer
    )
    # Rewards that are not known are 0, and stay so.
    reward = experience.reward + jnp.where(experience.scored > 0, penalty, 0.0)
    return experience._replace(reward=reward)


class Optimization(NamedTuple):
    """How RL takes its steps.

    Attributes:
      rate: step -> learning rate.
      optimizer: of optax.
    """

    rate: optax.Schedule
    optimizer: optax.GradientTransformation


def make_optimization(config: ml_collections.ConfigDict) -> Optimization:
    """The optimizer of RL."""
    r = config.rl
    steps = config.run.updates * r.epochs * r.minibatches
    rate = schedule(r.schedule, r.learning_rate, steps)
    return Optimization(rate, adam(rate, r.max_grad_norm))


def make_loss(config: ml_collections.ConfigDict, loss: TokenLoss) -> TokenLoss:
    """A policy loss with what the config adds to it."""
    r = config.rl
    return dataclasses.replace(
        loss, kl=r.kl, kl_weight=r.kl_weight, max_correction=r.max_correction
    )


def rl_learner(
    config: ml_collections.ConfigDict, trained: Params, optimizer: optax.GradientTransformation
) -> TokenState:
    """A learner as RL begins; it has a reference where one is used."""
    with_reference = _has_reference(config)
    return token_learner.init(trained, optimizer=optimizer, with_reference=with_reference)


def evaluated_together(config: ml_collections.ConfigDict) -> int:
    """The most questions that an evaluation answers at once: as many as training asks at once.

    An evaluation then never needs more memory than the updates, however many records it is of.
    """
    return config.sft.batch_size if config.algorithm == "sft" else config.rl.questions


def evaluation(
    measure: Callable[[Any, str], dict[str, float]], frozen: Any, split: str
) -> Callable[[TokenState], dict[str, float]]:
    """The periodic evaluation of a stage: learner -> metrics of a split, by their logged names.

    Args:
      measure: (trained and frozen half, split) -> metrics.
      frozen: the frozen half.
      split: that is evaluated.
    """

    def evaluate(learner: TokenState) -> dict[str, float]:
        found = measure((learner.params, frozen), split)
        return {f"eval/{split}/{name}": value for name, value in found.items()}

    return evaluate


def fresh_carry(config: ml_collections.ConfigDict, learner: TokenState, stage: int) -> Carry:
    """A carry without environments; each stage has a key of its own."""
    rng = jax.random.fold_in(jax.random.PRNGKey(config.seed), stage)
    return Carry(learner, None, rng, jnp.zeros((), jnp.int32))


def replicate(carry: Carry, *, mesh: Mesh) -> Carry:
    """A copy of the carry on every device; minibatches are split as they are learned from."""
    return jax.tree.map(lambda _: mesh_lib.replicated(mesh), carry)


def ppo_hyperparameters(config: ml_collections.ConfigDict) -> token_ppo.Hyperparameters:
    """Of PPO over tokens."""
    r, p = config.rl, config.ppo
    return token_ppo.Hyperparameters(
        discount=p.discount,
        gae_lambda=p.gae_lambda,
        loss=make_loss(config, TokenLoss(low=p.clip, high=p.clip)),
        value_clip=p.value_clip,
        value_weight=p.value_weight,
        entropy_weight=r.entropy_weight,
        temperature=r.temperature,
        epochs=r.epochs,
        minibatches=r.minibatches,
        grad_accum_steps=r.accumulate,
    )


# (learner, frozen half, answers with rewards, key) -> (learner, metrics).
Learn = Callable[[TokenState, Any, ScoredCompletions, jax.Array], tuple[TokenState, Metrics]]


def make_learn(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    policy: TokenPolicy,
    optimization: Optimization,
) -> Learn:
    """An update of the config's algorithm on answers that have their rewards."""
    r = config.rl
    update: dict[str, Any] = {
        "policy": dataclasses.replace(policy, pack_rows=r.pack_rows),
        "optimizer": optimization.optimizer,
        "shard": functools.partial(mesh_lib.constrain_batch, mesh=mesh),
    }
    steps = {"epochs": r.epochs, "minibatches": r.minibatches, "grad_accum_steps": r.accumulate}

    def kept(experience: ScoredCompletions) -> jax.Array:
        """Which answers are learned from where none is compared with a group's mean, [B, G]."""
        if not r.mask_truncated_completions:
            return experience.scored
        return experience.scored * experience.answers.finished

    if config.algorithm == "dpo":
        preferring = dpo.Hyperparameters(**config.dpo, **steps)

        def learn(
            learner: TokenState, frozen: Any, experience: ScoredCompletions, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            question, answers, reward, _ = experience
            preferences = dpo.best_and_worst(
                question, answers.tokens, answers.present, reward, kept(experience)
            )
            return dpo.update(
                learner, frozen, preferences, key, hyperparameters=preferring, **update
            )

    elif config.algorithm == "token_ppo":
        stepping = ppo_hyperparameters(config)

        def learn(
            learner: TokenState, frozen: Any, experience: ScoredCompletions, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            batch = single_turns(experience._replace(scored=kept(experience)))
            return token_ppo.update(
                learner, frozen, batch, None, key, hyperparameters=stepping, **update
            )

    else:
        name, loss = PRESETS[config.grpo.preset]
        advantage = group_advantages.ESTIMATORS[name]
        if config.grpo.pass_at_k is not None:
            advantage = functools.partial(group_advantages.pass_at_k, k=config.grpo.pass_at_k)
        grouping = grpo.Hyperparameters(
            advantage=advantage,
            loss=make_loss(config, loss),
            entropy_weight=r.entropy_weight,
            temperature=r.temperature,
            mask_truncated_completions=r.mask_truncated_completions,
            **steps,
        )

        def learn(
            learner: TokenState, frozen: Any, experience: ScoredCompletions, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            return grpo.update(learner, frozen, experience, key, hyperparameters=grouping, **update)

    return learn


def single_turns(experience: ScoredCompletions) -> Transition:
    """Groups of answers as episodes of one turn each, [1, B, G], to questions [1, B].

    An answer that was truncated has terminated too: its reward is for the text as it is, and no
    later reward is left out that a value would have to stand for.
    """
    question, answers, reward, scored = experience
    reward, valid = reward[None], scored[None]
    zeros = jnp.zeros_like(reward)
    return Transition(
        observation=jax.tree.map(lambda x: x[None], question),
        action=jax.tree.map(lambda x: x[None], answers),
        log_prob=zeros,
        value=zeros,
        reward=reward,
        terminated=jnp.ones_like(reward),
        truncated=zeros,
        valid=valid,
        privileged={},
        metrics={},
    )


class Learning(NamedTuple):
    """RL on answers that have their rewards, whoever asked and scored.

    Attributes:
      frozen: half of the model's variables, on every device.
      init: makes a fresh carry.
      release: of the `Stage`.
      step: (carry, frozen half, answers with rewards, key) -> (carry after an update, metrics).
    """

    frozen: Any
    init: Callable[[], Carry]
    release: Callable[[], object]
    step: Callable[[Carry, Any, ScoredCompletions, jax.Array], tuple[Carry, Metrics]]


def make_learning(
    config: ml_collections.ConfigDict, mesh: Mesh, model: TokenModel, start: Params | None
) -> Learning:
    """RL of a model, from where it is or from what was fine-tuned."""
    variables = make_variables(config, model, start=start)
    trained, frozen = partition_trainable(variables, config, "rl")
    optimization = make_optimization(config)
    learn = make_learn(config, mesh, model.policy, optimization)
    begin = Start(trained)

    def init() -> Carry:
        learner = rl_learner(config, begin(), optimization.optimizer)
        return fresh_carry(config, learner, 3)

    def step(
        carry: Carry, frozen: Any, experience: ScoredCompletions, key: jax.Array
    ) -> tuple[Carry, Metrics]:
        learner, metrics = learn(carry.learner, frozen, experience, key)
        learner = token_learner.move_reference(learner, config.rl.reference_decay)
        metrics |= {"lr": jnp.asarray(optimization.rate(learner.steps), jnp.float32)}
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
    return Learning(frozen, init, begin.release, step)


def make_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, learning: Learning, **differing: Any
) -> Stage:
    """A stage of such RL; what differs is how it asks and scores, and is evaluated."""
    return Stage(
        name=config.grpo.preset if config.algorithm == "grpo" else config.algorithm,
        init=learning.init,
        release=learning.release,
        constants=learning.frozen,
        env_steps_per_update=0,
        **run_fields(config.run),
        shardings=functools.partial(replicate, mesh=mesh),
        **differing,
    )


# Questions [B], the tokens of their answers, and which are there, [B, T].
Labels = tuple[Prompt, jax.Array, jax.Array]


def sft_stage(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    model: TokenModel,
    labels: Labels | Callable[[int], Labels],
    *,
    evaluation: Callable[[Any], Callable[[TokenState], dict[str, float]]],
    best_metric: str,
) -> Stage:
    """Supervised fine-tuning on answered questions.

    Args:
      config: of the run.
      mesh: that it runs on.
      model: learns.
      labels: a fixed set, which lies on every device; or what reads the batch of an update by its
        number and puts it on the mesh, so that no more than two batches are in memory.
      evaluation: frozen half -> learner -> metrics.
      best_metric: by which the best checkpoint is chosen.

    Returns:
      The stage; its constants are the frozen half, and the fixed set or None.
    """
    s = config.sft
    optimizer = adam(s.learning_rate, s.max_grad_norm)
    trained, frozen = partition_trainable(make_variables(config, model), config, "sft")
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
    begin = Start(trained)

    def init() -> Carry:
        learner = token_learner.init(begin(), optimizer=optimizer, with_reference=False)
        return fresh_carry(config, learner, 2)

    def step(carry: Carry, frozen: Any, labels: Labels) -> tuple[Carry, Metrics]:
        learner, metrics = sft.update(
            carry.learner,
            frozen,
            *labels,
            policy=model.policy,
            optimizer=optimizer,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    def update(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        frozen, labels = data
        chosen = epoch_indices(
            carry.rng, carry.updates, batch_size=s.batch_size, size=len(labels[1])
        )
        return step(carry, frozen, jax.tree.map(lambda x: x[chosen], labels))

    if callable(labels):
        read, fixed = labels, None
        taking: dict[str, Any] = {
            "update": None,
            "on_host": lambda carry, data: _reading(step, read, carry, data[0], s.updates, mesh),
        }
    else:
        fixed = jax.device_put(labels, mesh_lib.replicated(mesh))
        taking = {"update": update}
    return Stage(
        name="sft",
        init=init,
        release=begin.release,
        constants=(frozen, fixed),
        updates=s.updates,
        updates_per_dispatch=s.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=s.batch_size,
        evaluate=evaluation(frozen),
        eval_interval=s.eval_interval,
        checkpoint_interval=s.checkpoint_interval,
        keep=config.run.keep,
        best_metric=best_metric,
        console=("loss/sft", best_metric, "time/samples_per_s"),
        shardings=functools.partial(replicate, mesh=mesh),
        **taking,
    )


def _reading(
    step: Callable[[Carry, Any, Labels], tuple[Carry, Metrics]],
    read: Callable[[int], Labels],
    carry: Carry,
    frozen: Any,
    updates: int,
    mesh: Mesh,
) -> HostUpdate:
    """A step on labels that are read by its number, the next ones while it is taken."""
    jitted = jax.jit(step, donate_argnums=0, out_shardings=mesh_lib.replicated(mesh))
    lowered = jitted.lower(carry, frozen, read(0))
    compiled, labels = lowered.compile(), Prefetch(read, updates=updates)

    def collect(carry: Carry, _: Any) -> Labels:
        return labels(int(jax.device_get(carry.updates)))

    def update(carry: Carry, data: Any, batch: Labels) -> tuple[Carry, Metrics]:
        return compiled(carry, data[0], batch)

    metrics = mesh_lib.replicated_shapes(lowered.out_info[1], mesh=mesh)
    return HostUpdate(collect, update, metrics)
