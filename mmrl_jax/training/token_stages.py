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
from mmrl_jax.learners.grpo import Experience
from mmrl_jax.learners.token_learner import TokenPolicy, TokenState
from mmrl_jax.rl import group_advantages
from mmrl_jax.rl.token_losses import KLS, PRESETS, TokenLoss
from mmrl_jax.tasks.question import Question
from mmrl_jax.training import config as config_lib
from mmrl_jax.training.config import between, non_negative, one_of, pattern, positive
from mmrl_jax.training.factory import adam, run_fields, schedule
from mmrl_jax.training.loop import Carry, Stage
from mmrl_jax.training.token_models import TokenModel, halves, make_variables
from mmrl_jax.types import Metrics, Params, Transition

SFT: config_lib.Schema = {
    "updates": non_negative(int, "optimiser steps of supervised fine-tuning; 0 for none"),
    "batch_size": positive(int, "samples an optimiser step"),
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
    "minibatches": positive(int, "optimiser steps a pass"),
    "accumulate": positive(int, "parts of a minibatch whose gradients are added up"),
}

PPO: config_lib.Schema = {
    "discount": between(float, 0, 1, "per turn"),
    "gae_lambda": between(float, 0, 1, "of the advantage estimate, per token"),
    "clip": positive(float, "half width of the trust interval of the ratio"),
    "value_clip": positive((float, type(None)), "of the value loss"),
    "value_weight": non_negative(float, "of the value loss"),
}


class Optimisation(NamedTuple):
    """How RL takes its steps.

    Attributes:
      rate: step -> learning rate.
      optimiser: of optax.
    """

    rate: optax.Schedule
    optimiser: optax.GradientTransformation


def make_optimisation(config: ml_collections.ConfigDict) -> Optimisation:
    """The optimiser of RL."""
    r = config.rl
    steps = config.run.updates * r.epochs * r.minibatches
    rate = schedule(r.schedule, r.learning_rate, steps)
    return Optimisation(rate, adam(rate, r.max_grad_norm))


def make_loss(config: ml_collections.ConfigDict, loss: TokenLoss) -> TokenLoss:
    """A policy loss with what the config adds to it."""
    r = config.rl
    return dataclasses.replace(
        loss, kl=r.kl, kl_weight=r.kl_weight, max_correction=r.max_correction
    )


def rl_learner(
    config: ml_collections.ConfigDict, trained: Params, optimiser: optax.GradientTransformation
) -> TokenState:
    """A learner as RL begins; it has a reference where one is used."""
    wanted = config.rl.kl_weight > 0 or config.algorithm == "dpo"
    return token_learner.init(trained, optimiser=optimiser, with_reference=wanted)


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


def everywhere(carry: Carry, *, mesh: Mesh) -> Carry:
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
        accumulate=r.accumulate,
    )


# (learner, frozen half, answers with rewards, key) -> (learner, metrics).
Learn = Callable[[TokenState, Any, Experience, jax.Array], tuple[TokenState, Metrics]]


def make_learn(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    policy: TokenPolicy,
    optimisation: Optimisation,
) -> Learn:
    """An update of the config's algorithm on answers that have their rewards."""
    r = config.rl
    update: dict[str, Any] = {
        "policy": dataclasses.replace(policy, pack_rows=r.pack_rows),
        "optimiser": optimisation.optimiser,
        "shard": functools.partial(mesh_lib.constrain_batch, mesh=mesh),
    }
    steps = {"epochs": r.epochs, "minibatches": r.minibatches, "accumulate": r.accumulate}
    if config.algorithm == "dpo":
        preferring = dpo.Hyperparameters(**config.dpo, **steps)

        def learn(
            learner: TokenState, frozen: Any, experience: Experience, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            question, answers, reward, scored = experience
            preferences = dpo.best_and_worst(
                question, answers.tokens, answers.present, reward, scored
            )
            return dpo.update(
                learner, frozen, preferences, key, hyperparameters=preferring, **update
            )

    elif config.algorithm == "token_ppo":
        stepping = ppo_hyperparameters(config)

        def learn(
            learner: TokenState, frozen: Any, experience: Experience, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            batch, last = single_turns(experience)
            return token_ppo.update(
                learner, frozen, batch, last, key, hyperparameters=stepping, **update
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
            **steps,
        )

        def learn(
            learner: TokenState, frozen: Any, experience: Experience, key: jax.Array
        ) -> tuple[TokenState, Metrics]:
            return grpo.update(learner, frozen, experience, key, hyperparameters=grouping, **update)

    return learn


def single_turns(experience: Experience) -> tuple[Transition, Question]:
    """Answers to questions as episodes of one turn each, [1, B * G], and what follows: anything."""
    question, answers, reward, scored = experience
    group = reward.shape[1]
    asked = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), question)
    reward, valid = reward.reshape(1, -1), scored.reshape(1, -1)
    zeros = jnp.zeros_like(reward)
    batch = Transition(
        observation=jax.tree.map(lambda x: x[None], asked),
        action=jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), answers),
        log_prob=zeros,
        value=zeros,
        reward=reward,
        terminated=jnp.ones_like(reward),
        truncated=zeros,
        valid=valid,
        privileged={},
        metrics={},
    )
    return batch, asked


class Learning(NamedTuple):
    """RL on answers that have their rewards, whoever asked and scored.

    Attributes:
      frozen: half of the model's variables, on every device.
      init: makes a fresh carry.
      step: (carry, frozen half, answers with rewards, key) -> (carry after an update, metrics).
    """

    frozen: Any
    init: Callable[[], Carry]
    step: Callable[[Carry, Any, Experience, jax.Array], tuple[Carry, Metrics]]


def make_learning(
    config: ml_collections.ConfigDict, mesh: Mesh, model: TokenModel, start: Params | None
) -> Learning:
    """RL of a model, from where it is or from what was fine-tuned."""
    variables = make_variables(config, model, start=start)
    trained, frozen = halves(variables, config, "rl")
    optimisation = make_optimisation(config)
    learn = make_learn(config, mesh, model.policy, optimisation)

    def init() -> Carry:
        learner = rl_learner(config, trained, optimisation.optimiser)
        return fresh_carry(config, learner, 3)

    def step(
        carry: Carry, frozen: Any, experience: Experience, key: jax.Array
    ) -> tuple[Carry, Metrics]:
        learner, metrics = learn(carry.learner, frozen, experience, key)
        learner = token_learner.move_reference(learner, config.rl.reference_decay)
        metrics |= {"lr": jnp.asarray(optimisation.rate(learner.steps), jnp.float32)}
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    return Learning(jax.device_put(frozen, mesh_lib.replicated(mesh)), init, step)


def make_stage(
    config: ml_collections.ConfigDict, mesh: Mesh, learning: Learning, **differing: Any
) -> Stage:
    """A stage of such RL; what differs is how it asks and scores, and is evaluated."""
    return Stage(
        name=config.grpo.preset if config.algorithm == "grpo" else config.algorithm,
        init=learning.init,
        data=learning.frozen,
        env_steps_per_update=0,
        **run_fields(config.run),
        shardings=functools.partial(everywhere, mesh=mesh),
        **differing,
    )


def sft_stage(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    model: TokenModel,
    labels: tuple[Question, jax.Array, jax.Array],
    *,
    evaluation: Callable[[Any], Callable[[TokenState], dict[str, float]]],
    best_metric: str,
) -> Stage:
    """Supervised fine-tuning on a fixed set of answered questions.

    Args:
      config: of the run.
      mesh: that it runs on.
      model: learns.
      labels: questions [N], the tokens of their answers, and which are there, [N, T].
      evaluation: frozen half -> learner -> metrics.
      best_metric: by which the best checkpoint is chosen.
    """
    s = config.sft
    optimiser = adam(s.learning_rate, s.max_grad_norm)
    trained, frozen = halves(make_variables(config, model), config, "sft")
    frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))

    def init() -> Carry:
        learner = token_learner.init(trained, optimiser=optimiser, with_reference=False)
        return fresh_carry(config, learner, 2)

    def update(carry: Carry, data: Any) -> tuple[Carry, Metrics]:
        frozen, labels = data
        rng = jax.random.fold_in(carry.rng, carry.updates)
        chosen = jax.random.randint(rng, (s.batch_size,), 0, len(labels[1]))
        learner, metrics = sft.update(
            carry.learner,
            frozen,
            *jax.tree.map(lambda x: x[chosen], labels),
            policy=model.policy,
            optimiser=optimiser,
            shard=functools.partial(mesh_lib.constrain_batch, mesh=mesh),
        )
        return carry.replace(learner=learner, updates=carry.updates + 1), metrics

    return Stage(
        name="sft",
        init=init,
        update=update,
        data=(frozen, jax.device_put(labels, mesh_lib.replicated(mesh))),
        updates=s.updates,
        updates_per_dispatch=s.updates_per_dispatch,
        env_steps_per_update=0,
        samples_per_update=s.batch_size,
        evaluate=evaluation(frozen),
        eval_interval=s.eval_interval,
        checkpoint_interval=s.checkpoint_interval,
        keep=config.run.keep,
        best_metric=best_metric,
        console=("loss/answer", best_metric, "time/samples_per_s"),
        shardings=functools.partial(everywhere, mesh=mesh),
    )
