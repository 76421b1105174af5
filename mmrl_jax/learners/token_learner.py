"""What all learners of token policies share: their state, the policy, and scoring its answers."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, cast

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from mmrl_jax.config.options import NON_NEGATIVE, POSITIVE, between, option
from mmrl_jax.distributed.mesh import TENSOR, on_mesh
from mmrl_jax.envs.brax_api import State
from mmrl_jax.learners.learner import (
    Shard,
    accumulate,
    apply_gradients,
    gather,
    mean_over_steps,
    minibatch_order,
)
from mmrl_jax.models.heads import ValueHead
from mmrl_jax.models.language import LanguageModel
from mmrl_jax.models.lora import join
from mmrl_jax.models.vlm import VisionLanguageModel
from mmrl_jax.rl.token_log_probs import TokenLogProbs
from mmrl_jax.rl.token_losses import KL
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
        1, "Optimizer steps of a pass; they divide the prompts of an update.", POSITIVE
    )
    grad_accum_steps: int = option(
        1, "Parts of a minibatch, one at a time in memory, whose gradients are added up.", POSITIVE
    )
    mask_truncated_completions: bool = option(
        False, "Learn nothing from completions without a stop token, as in TRL."
    )
    reference_ema_decay: float = option(
        1.0,
        "Decay, per update, of the moving average of the policy that the reference is; 1 keeps the "
        "reference where the stage began.",
        between(0, 1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientOptions(StepOptions):
    """What algorithms have in common that follow a policy gradient over tokens."""

    kl_estimator: KL = option(
        "k3", "Estimator of the KL to the reference, which is where the stage began."
    )
    kl_coef: float = option(
        0.0, "Coefficient of the KL to the reference; 0 keeps no reference.", NON_NEGATIVE
    )
    entropy_coef: float = option(0.0, "Coefficient of the entropy bonus.", NON_NEGATIVE)
    importance_weight_cap: float | None = option(
        None,
        "Largest importance weight, where completions are sampled in another precision than they "
        "are learned from; None for no such weights.",
        POSITIVE,
    )


def reference_needs(options: PolicyGradientOptions) -> frozenset[str]:
    """Returns {'reference'} where the options put a coefficient on the KL to it."""
    return frozenset({"reference"} if options.kl_coef > 0 else ())


class ScoredCompletions(NamedTuple):
    """The experience of a token policy: T turns of B prompts with G completions each.

    A prompt with G completions is G episodes of one turn, T = 1; an agent that writes its actions
    has as many turns as its environment has steps, with one completion each, G = 1.

    Attributes:
      prompt: Of [T, B] samples.
      completions: [T, B, G, L] tokens.
      reward: Float32 [T, B, G]; None of labels.
      valid: Float32 [T, B, G], 0 for completions that have no reward or were not taken; None of
        labels.
      terminated: Float32 [T, B, G], 1 where an episode ends with its turn; None of labels.
      truncated: Float32 [T, B, G], 1 where a limit cuts an episode off; None of labels.
      next_prompt: Of B samples, after the last turn; None where every episode terminates with its
        last turn.
    """

    prompt: Prompt
    completions: gen.Completions
    reward: Any = None
    valid: Any = None
    terminated: Any = None
    truncated: Any = None
    next_prompt: Prompt | None = None

    @classmethod
    def labelled(cls, prompt: Prompt, tokens: jax.Array, mask: jax.Array) -> "ScoredCompletions":
        """Returns given completions, int32 and bool [B, L], of B prompts; they have no rewards."""
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

        A completion that was truncated has terminated too: its reward is for the text as it is, and
        no later reward is left out that a value would have to stand for.
        """
        prompt, completions, reward, valid = jax.tree.map(
            lambda x: x[None], (prompt, completions, reward, valid)
        )
        ones = jnp.ones_like(reward)
        return cls(prompt, completions, reward, valid, ones, jnp.zeros_like(reward))

    @classmethod
    def turns(cls, batch: Transition, next_prompt: Prompt) -> "ScoredCompletions":
        """Returns the turns [T, B] of agents, whose observations are prompts, as groups of one."""
        completions, reward, valid, terminated, truncated = jax.tree.map(
            lambda x: x[:, :, None],
            (batch.action, batch.reward, batch.valid, batch.terminated, batch.truncated),
        )
        return cls(
            batch.observation, completions, reward, valid, terminated, truncated, next_prompt
        )


class TokenState(struct.PyTreeNode):
    """Everything a learner of tokens carries from update to update.

    Attributes:
      params: the trained half of the model's variables, see `models.lora.split`.
      opt_state: state of the optax optimizer.
      reference: parameters that the policy is kept near to, as `params`; () where to none.
      steps: int32 [], optimizer steps taken.
    """

    params: Params
    opt_state: optax.OptState
    reference: Params
    steps: jax.Array

    def without_optimizer(self) -> "TokenState":
        """What the learner acts with."""
        return self.replace(opt_state=(), reference=())


def init(
    params: Params, *, optimizer: optax.GradientTransformation, with_reference: bool
) -> TokenState:
    """A fresh learner around a trained half; the reference is where it starts."""
    return TokenState(
        params=params,
        opt_state=optimizer.init(params),
        reference=params if with_reference else (),
        steps=jnp.zeros((), jnp.int32),
    )


def agent_policy(
    policy: "TokenPolicy",
    variables: tuple[Params, Any],
    interface: TextActions,
    sampling: gen.Sampling,
) -> PolicyFunction:
    """The policy function of an agent that writes its actions, for `rollouts.unroll`.

    A decision's action is the `Completions` text [B, T]; its log-probs and values are those of the
    text's tokens, and come with learning.

    Args:
      policy: the model.
      variables: trained and frozen half of its variables.
      interface: of the environment.
      sampling: how tokens are chosen.
    """

    def decide(env_state: State, rng: jax.Array) -> ActorOutput:
        prompts = interface.make_prompts(env_state.obs)
        completions = policy.generate(
            *variables, prompts, rng, num_completions=1, sampling=sampling
        )
        completions = jax.tree.map(lambda x: x[:, 0], completions)
        action, _ = interface.decode_actions(completions.tokens, completions.mask)
        return deterministic_output(action)._replace(action=completions)

    return decide


def move_reference(state: TokenState, decay: float) -> TokenState:
    """Moves the reference to the policy by 1 - decay of the way: a moving average, or at 1 none."""
    if decay == 1:
        return state
    reference = optax.incremental_update(state.params, state.reference, 1 - decay)
    return state.replace(reference=reference)


_VALUE = ValueHead()


def with_value_head(rng: jax.Array, variables: Params, width: int) -> Params:
    """Variables of a model, and beside them, as 'value', a head on its features [..., width]."""
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
    """Epochs of minibatch steps on samples [N, ...].

    Args:
      state: the learner.
      samples: pytree.
      rng: key of the shuffles.
      part_loss: (parameters, part of a minibatch, what `normalizer` says of the minibatch) -> the
        part's shares [] of the loss and of metrics, which add up to the minibatch's.
      normalizer: minibatch -> what the losses of its parts are divided by.
      optimizer: the one whose state the learner holds.
      options: how many steps are taken, and in how many parts.
      shard: places a minibatch on the mesh.

    Returns:
      The new learner, and metrics: means over the optimizer steps that were taken.
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
    """A language model, or one with vision, that answers questions.

    `frozen` is the other half of its variables, shared by the policy and its reference.

    Attributes:
      model: the model; one without vision reads the questions' tokens alone.
      max_new_tokens: most tokens of an answer.
      stop: tokens any of which ends an answer.
      pad: token that stands behind it.
      preprocess_images: images of questions, uint8 [B, H, W, 3], to what the vision model takes.
      positions: of tokens int32 [B, S] of which bool [B, S] are present, as
        `EmbeddedPrompt.positions`; None where they are counted.
      tile: rows of the output layer at a time, see `token_log_probs`.
      mesh: The devices that its variables lie on; None for one device.
      pack_rows: that the answers to a question are packed into for learning, see
        `completion_log_probs`;
        None: not packed.
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

    def inputs(self, prompts: Prompt) -> tuple[Any, ...]:
        """What the model takes of B questions, behind its variables."""
        tokens, mask = prompts.tokens, prompts.mask
        if isinstance(self.model, LanguageModel):
            return tokens, mask
        positions = self.positions and self.positions(tokens, mask)
        return tokens, mask, self.preprocess_images(prompts.images), positions

    def generate(
        self,
        params: Params,
        frozen: Any,
        prompts: Prompt,
        rng: jax.Array,
        *,
        num_completions: int,
        sampling: gen.Sampling,
    ) -> gen.Completions:
        """Draws `num_completions` answers to each of B questions, [B, G, T]."""
        variables = join(params, frozen)
        language, language_variables = gen.language(self.model, variables)
        with on_mesh(self.mesh):
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
        """Log-probs and entropies of answers int32 [B, G, T], float32 [B, G, T] each."""
        variables = join(params, frozen)
        score = self._log_probs(variables, temperature)
        return self._score(variables, prompts, tokens, mask, score)

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
        """`log_probs`, and the values before each token, float32 [B, G, T].

        The parameters hold a value head, see `with_value_head`.
        """
        variables = join(params, frozen)
        log_probs = self._log_probs(variables, temperature)

        def score(features: jax.Array, tokens: jax.Array) -> tuple[TokenLogProbs, jax.Array]:
            value = _VALUE.apply({"params": variables["value"]}, features)
            return log_probs(features, tokens), cast(jax.Array, value)

        return self._score(variables, prompts, tokens, mask, score)

    def _score(
        self,
        variables: Any,
        prompts: Prompt,
        tokens: jax.Array,
        mask: jax.Array,
        score: Callable[[jax.Array, jax.Array], Output],
    ) -> Output:
        language, language_variables = gen.language(self.model, variables)
        with on_mesh(self.mesh):
            embedded = self._embed(variables, prompts)
            return completion_log_probs(
                language,
                language_variables,
                embedded,
                tokens,
                mask,
                score,
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
        """The parts that the rows of the output layer are split into, see `partition.RULES`."""
        shards = 1 if self.mesh is None else self.mesh.shape.get(TENSOR, 1)
        return shards if language.vocabulary % shards == 0 else 1

    def _embed(self, variables: Any, prompts: Prompt) -> gen.EmbeddedPrompt:
        if isinstance(self.model, LanguageModel):
            return gen.text_prompt(self.model, variables, *self.inputs(prompts))
        return gen.image_prompt(self.model, variables, *self.inputs(prompts))
