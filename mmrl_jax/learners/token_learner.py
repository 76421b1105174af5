"""The parts that all learners of token policies share: options, experience, state and policy."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, cast

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from mmrl_jax.config.options import POSITIVE, between, option
from mmrl_jax.distributed import partition
from mmrl_jax.distributed.mesh import FSDP, TENSOR, on_mesh
from mmrl_jax.envs.brax_api import State
from mmrl_jax.learners.learner import (
    Shard,
    accumulate,
    apply_gradients,
    gather,
    mean_over_steps,
    minibatch_order,
)
from mmrl_jax.models.attention import Implementation, attention_by
from mmrl_jax.models.heads import ValueHead
from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.lora import join
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rollouts import generate as gen
from mmrl_jax.rollouts.log_probs import Output, completion_log_probs, log_probs_from_features
from mmrl_jax.rollouts.text_actions import TextActions
from mmrl_jax.rollouts.unroll import ActorOutput, PolicyFunction, deterministic_output
from mmrl_jax.tasks.prompts import Prompt
from mmrl_jax.types import Metrics, Params, Transition


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of every algorithm that learns from completions in several optimizer steps."""

    temperature: float = option(
        1.0, "Temperature that completions are sampled and learned from at.", POSITIVE
    )
    num_epochs: int = option(1, "Passes over the batch of an update.", POSITIVE)
    num_minibatches: int = option(
        1,
        "Optimizer steps in a pass; they must divide the number of prompts of an update.",
        POSITIVE,
    )
    grad_accum_steps: int = option(
        1, "Parts of a minibatch whose gradients are accumulated, to save memory.", POSITIVE
    )
    mask_truncated_completions: bool = option(
        False, "Mask completions without a stop token out of the loss, as in TRL."
    )
    reference_ema_decay: float = option(
        1.0,
        "Decay, per update, of the moving average of the policy that is the reference; 1 keeps the "
        "policy with which the stage began.",
        between(0, 1),
    )


class ScoredCompletions(NamedTuple):
    """The experience of a token policy: T turns of B prompts with G completions each.

    A prompt with G completions is G episodes of one turn, T = 1; an agent that writes its actions
    has as many turns as its environment has steps, with one completion each, G = 1.

    Attributes:
      prompt: Prompts [T, B].
      completions: Completions [T, B, G] of up to L tokens.
      reward: Rewards, float32 [T, B, G]; None for labels.
      valid: 0 for completions that have no reward, or whose turn only reset the environment,
        float32 [T, B, G]; None for labels.
      terminated: 1 where the episode terminates with the turn, float32 [T, B, G]; None for labels.
      truncated: 1 where a limit truncates the episode after the turn, float32 [T, B, G]; None for
        labels.
      next_prompt: Prompts [B] after the last turn; None if every episode terminates with its last
        turn.
    """

    prompt: Prompt
    completions: gen.Completions
    reward: Any = None
    valid: Any = None
    terminated: Any = None
    truncated: Any = None
    next_prompt: Prompt | None = None

    @classmethod
    def from_labels(cls, prompt: Prompt, tokens: jax.Array, mask: jax.Array) -> "ScoredCompletions":
        """Returns labels: one completion, int32 and bool [B, L], of each of B prompts."""
        completions = gen.Completions(tokens, None, mask, None)  # type: ignore[arg-type]
        return cls(
            jax.tree.map(lambda x: x[None], prompt),
            jax.tree.map(lambda x: x[None, :, None], completions),
        )

    @classmethod
    def single_turn(
        cls, prompt: Prompt, completions: gen.Completions, reward: jax.Array, valid: jax.Array
    ) -> "ScoredCompletions":
        """Returns G completions of each of B prompts, with rewards float32 [B, G].

        A truncated completion has terminated too. Its reward is that of the truncated text, so that
        no later reward has to be estimated by a value.
        """
        prompt, completions, reward, valid = jax.tree.map(
            lambda x: x[None], (prompt, completions, reward, valid)
        )
        ones = jnp.ones_like(reward)
        return cls(prompt, completions, reward, valid, ones, jnp.zeros_like(reward))

    @classmethod
    def turns(cls, batch: Transition, next_prompt: Prompt) -> "ScoredCompletions":
        """Returns T turns of B agents, with one completion each; their observations are prompts."""
        completions, reward, valid, terminated, truncated = jax.tree.map(
            lambda x: x[:, :, None],
            (batch.action, batch.reward, batch.valid, batch.terminated, batch.truncated),
        )
        return cls(
            batch.observation, completions, reward, valid, terminated, truncated, next_prompt
        )


class TokenState(struct.PyTreeNode):
    """State of a learner of a token policy.

    Attributes:
      params: Trainable variables of the model, see `models.lora.split`.
      opt_state: State of the optax optimizer.
      reference: Parameters of the reference policy, with the structure of `params`; () without one.
      steps: Number of optimizer steps taken, int32 [].
      extras: What an algorithm has beside the policy, by name, see `registry.Algorithm.extras`.
    """

    params: Params
    opt_state: optax.OptState
    reference: Params
    steps: jax.Array
    extras: dict[str, Any] = struct.field(default_factory=dict)

    def without_optimizer(self) -> "TokenState":
        """Returns the state without what only the optimizer and the loss need."""
        return self.replace(opt_state=(), reference=(), extras={})


def init(
    params: Params,
    *,
    optimizer: optax.GradientTransformation,
    with_reference: bool,
    extras: dict[str, Any] | None = None,
) -> TokenState:
    """Returns the initial state, whose reference is `params`.

    Args:
      params: Trainable variables of the model.
      optimizer: Optimizer whose state is initialized.
      with_reference: Whether the algorithm needs a reference policy.
      extras: What the algorithm has beside the policy; None for nothing.
    """
    return TokenState(
        params=params,
        opt_state=optimizer.init(params),
        reference=params if with_reference else (),
        steps=jnp.zeros((), jnp.int32),
        extras=extras or {},
    )


def agent_policy(
    policy: "TokenPolicy",
    variables: tuple[Params, Any],
    interface: TextActions,
    sampling: gen.Sampling,
) -> PolicyFunction:
    """Returns the policy function, for `rollouts.unroll`, of an agent that writes its actions.

    The action in its output is the `Completions` [B, T]. The log-probs and values in its output are
    0: learners compute those of the tokens.

    Args:
      policy: Token policy.
      variables: Trainable and frozen variables of the model.
      interface: Instructions and actions of the environment as text.
      sampling: How tokens are sampled.
    """

    def act(env_state: State, rng: jax.Array) -> ActorOutput:
        prompts = interface.make_prompts(env_state.obs)
        completions = policy.generate(
            *variables, prompts, rng, num_completions=1, sampling=sampling
        )
        completions = jax.tree.map(lambda x: x[:, 0], completions)
        action, _ = interface.decode_actions(completions.tokens, completions.mask)
        return deterministic_output(action)._replace(action=completions)

    return act


def move_reference(state: TokenState, decay: float) -> TokenState:
    """Returns the state with reference = decay * reference + (1 - decay) * params."""
    if decay == 1:
        return state
    reference = optax.incremental_update(state.params, state.reference, 1 - decay)
    return state.replace(reference=reference)


_VALUE = ValueHead()


def with_value_head(rng: jax.Array, variables: Params, width: int) -> Params:
    """Returns the variables of a model and, as 'value', those of a value head.

    Args:
      rng: PRNG key of the head's parameters.
      variables: Variables of the model.
      width: Size of the features that the head reads.
    """
    return variables | {"value": _VALUE.init(rng, jnp.zeros((1, width)))["params"]}


def minibatch_epochs(
    state: TokenState,
    samples: Any,
    rng: jax.Array,
    *,
    part_loss: Callable[[Params, Any, Any], tuple[jax.Array, Metrics]],
    normalizer: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    shard: Shard,
) -> tuple[TokenState, Metrics]:
    """Takes optimizer steps on minibatches of N samples, in one or more epochs.

    Args:
      state: State of the learner.
      samples: Pytree of arrays [N, ...].
      rng: PRNG key of the shuffles.
      part_loss: Function (parameters, part, normalizer) that returns the loss [] of a part of a
        minibatch and its metrics [], which add up over the parts.
      normalizer: Function of a minibatch that returns the denominators of the losses of its parts.
      optimizer: Optimizer whose state is `state.opt_state`.
      options: Numbers of epochs, minibatches and parts.
      shard: Function that places a minibatch on the mesh.

    Returns:
      The new state, and the means of the metrics over the optimizer steps that were taken.
    """
    gradient = jax.value_and_grad(part_loss, has_aux=True)

    def take_step(state: TokenState, indices: jax.Array) -> tuple[TokenState, Metrics]:
        minibatch = shard(gather(samples, indices))
        total = normalizer(minibatch)
        (loss, metrics), gradients = accumulate(
            lambda part: gradient(state.params, part, total), minibatch, options.grad_accum_steps
        )
        state, step_metrics = apply_gradients(state, loss, gradients, optimizer)
        return state, metrics | step_metrics

    size = len(jax.tree.leaves(samples)[0])
    keys = jax.random.split(rng, options.num_epochs)
    order = minibatch_order(keys, size, options.num_minibatches)
    state, metrics = jax.lax.scan(take_step, state, order)
    return state, mean_over_steps(metrics)


@dataclasses.dataclass(frozen=True)
class TokenPolicy:
    """A language model or vision-language model that completes prompts.

    Its methods take the trainable variables `params` and the other ones, `frozen`, which the policy
    and its reference share.

    Attributes:
      model: The model; a language model reads only the tokens of a prompt.
      max_new_tokens: Largest number T of tokens of a completion.
      stop: Token ids any of which ends a completion.
      pad: Token id of padding after the end of a completion.
      preprocess_images: Function of images uint8 [B, H, W, 3] that returns the inputs of the vision
        model.
      positions: Function of tokens int32 [B, S] and their mask bool [B, S] that returns
        `EmbeddedPrompt.positions`; None to count the tokens.
      tile: Number of rows of the output layer in a tile, see `token_log_probs`.
      mesh: Mesh of the devices that the variables are sharded over; None for one device.
      pack_rows: Number of rows that the completions of a prompt are packed into for learning, see
        `completion_log_probs`; None for no packing.
      gather_for_sampling: Whether to gather all variables over 'fsdp' once before sampling;
        otherwise each matrix is gathered where it is used.
      attention: Who computes attention, see `attention_by`.
    """

    model: VisionLanguageModel | LanguageModel
    max_new_tokens: int
    stop: tuple[int, ...]
    pad: int
    preprocess_images: Callable[[jax.Array], Any] = lambda images: images
    positions: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    tile: int = 4096
    mesh: Mesh | None = None
    pack_rows: int | None = None
    gather_for_sampling: bool = False
    attention: Implementation = "auto"

    def inputs(self, prompts: Prompt) -> tuple[Any, ...]:
        """Returns the inputs of the model for B prompts."""
        tokens, mask = prompts.tokens, prompts.mask
        if isinstance(self.model, LanguageModel):
            return tokens, mask
        positions = self.positions and self.positions(tokens, mask)
        return tokens, mask, self.preprocess_images(prompts.images), positions

    @jax.named_scope("generate")
    def generate(
        self,
        params: Params,
        frozen: Any,
        prompts: Prompt,
        rng: jax.Array,
        *,
        num_completions: int,
        sampling: gen.Sampling,
        compactions: int = 0,
    ) -> gen.Completions:
        """Samples G completions of each of B prompts, see `generate.generate`."""
        variables = join(params, frozen)
        if self.gather_for_sampling and self.mesh is not None:
            shardings = partition.shardings(variables, self.mesh, without=(FSDP,))
            variables = jax.lax.with_sharding_constraint(variables, shardings)
        language, language_variables = gen.language(self.model, variables)
        with on_mesh(self.mesh), attention_by(self.attention):
            return gen.generate(
                language,
                language_variables,
                self._embed(variables, prompts),
                rng,
                num_completions=num_completions,
                max_new_tokens=self.max_new_tokens,
                sampling=sampling,
                stop=self.stop,
                pad=self.pad,
                compactions=compactions,
            )

    def log_probs(
        self,
        params: Params,
        frozen: Any,
        prompts: Prompt,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        temperature: float,
    ) -> TokenLogProbs:
        """Returns the log-probs and entropies of the tokens of completions, float32 [B, G, T].

        Args:
          params: Trainable variables.
          frozen: Frozen variables.
          prompts: B prompts.
          tokens: Tokens of G completions of each prompt, int32 [B, G, T].
          mask: False for padding, bool [B, G, T].
          temperature: Sampling temperature, > 0.
        """
        variables = join(params, frozen)
        per_token = self._log_probs(variables, temperature)
        return self._apply_per_token(variables, prompts, tokens, mask, per_token)

    def log_probs_and_values(
        self,
        params: Params,
        frozen: Any,
        prompts: Prompt,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        temperature: float,
    ) -> tuple[TokenLogProbs, jax.Array]:
        """Returns the results of `log_probs`, and the values before each token, float32 [B, G, T].

        The parameters must have a value head, see `with_value_head`.
        """
        variables = join(params, frozen)
        log_probs = self._log_probs(variables, temperature)

        def per_token(features: jax.Array, tokens: jax.Array) -> tuple[TokenLogProbs, jax.Array]:
            value = _VALUE.apply({"params": variables["value"]}, features)
            return log_probs(features, tokens), cast(jax.Array, value)

        return self._apply_per_token(variables, prompts, tokens, mask, per_token)

    @jax.named_scope("log_probs")
    def _apply_per_token(
        self,
        variables: Any,
        prompts: Prompt,
        tokens: jax.Array,
        mask: jax.Array,
        per_token: Callable[[jax.Array, jax.Array], Output],
    ) -> Output:
        language, language_variables = gen.language(self.model, variables)
        with on_mesh(self.mesh), attention_by(self.attention):
            embedded = self._embed(variables, prompts)
            return completion_log_probs(
                language,
                language_variables,
                embedded,
                tokens,
                mask,
                per_token,
                pack_rows=self.pack_rows,
            )

    def _log_probs(
        self, variables: Any, temperature: float
    ) -> Callable[[jax.Array, jax.Array], TokenLogProbs]:
        language, language_variables = gen.language(self.model, variables)
        return functools.partial(
            log_probs_from_features,
            language,
            language_variables,
            temperature=temperature,
            tile=self.tile,
            shards=self._vocabulary_shards(language),
        )

    def _vocabulary_shards(self, language: LanguageModel) -> int:
        """Returns the number of shards of the rows of the output layer, see `partition.RULES`."""
        shards = 1 if self.mesh is None else self.mesh.shape.get(TENSOR, 1)
        return shards if language.vocabulary % shards == 0 else 1

    def _embed(self, variables: Any, prompts: Prompt) -> gen.EmbeddedPrompt:
        if isinstance(self.model, LanguageModel):
            return gen.text_prompt(self.model, variables, *self.inputs(prompts))
        return gen.image_prompt(self.model, variables, *self.inputs(prompts))
