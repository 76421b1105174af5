"""The algorithms by name: what each needs, and its update.

An algorithm is a frozen dataclass of options, the kind of experience that it learns from, and a
pure update. Its name is the name of its group in a config, and of its stage. A row is all that a
new algorithm needs; rows of your own are added from your own file:

    registry.CONTROL["my_ppo"] = registry.Algorithm(
        options=MyPPO, experience="rollout", update=my_update, console=("loss/policy",)
    )
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mmrl_jax.learners import bc, dpo, grpo, ppo, sft, token_ppo
from mmrl_jax.learners.token_learner import reference_needs


class Algorithm(NamedTuple):
    """An algorithm, as a problem builds a stage of it.

    Attributes:
      options: Dataclass of hyperparameters, see `config.options`.
      experience: The kind of experience that it learns from, which a problem has a source of. For
        control policies 'rollout' (`learner.Rollout`) or 'demonstrations' (`bc.Batch`), for token
        policies 'completions' (`token_learner.ScoredCompletions`) or 'labels' (the same,
        without rewards).
      update: (learner, batch, key, *, apply, optimizer, options, shard) -> (learner, metrics); for
        token policies (learner, frozen, batch, key, *, ...). It is traced into the compiled update.
        Its metrics have 'optimizer/steps' and 'optimizer/skipped_steps', see
        `learner.apply_gradients`.
      console: Metrics that the console shows.
      prepare: (parameters, options) -> parameters with which the stage begins.
      needs: Of a token policy: the names of what it needs beside the policy, 'value_head' and, by
        its options, 'reference'.
      compares: Of a token policy: which completions to one prompt are compared with each other, all
        of a group or pairs of them. A turn of an agent has one completion, and nothing to compare.
    """

    options: type
    experience: str
    update: Callable[..., tuple[Any, Any]]
    console: tuple[str, ...]
    prepare: Callable[[Any, Any], Any] = lambda params, options: params
    needs: Callable[[Any], frozenset[str]] = lambda options: frozenset()
    compares: Literal["nothing", "groups", "pairs"] = "nothing"


CONTROL: dict[str, Algorithm] = {
    "bc": Algorithm(bc.BC, "demonstrations", bc.update, ("loss/bc", "loss/pointing")),
    "ppo": Algorithm(
        ppo.PPO,
        "rollout",
        ppo.update,
        ("episode/return", "episode/success"),
        prepare=lambda params, options: ppo.with_std(params, options.initial_std),
    ),
}

TOKEN: dict[str, Algorithm] = {
    "sft": Algorithm(sft.SFT, "labels", sft.update, ("loss/sft",)),
    "grpo": Algorithm(
        grpo.GRPO, "completions", grpo.update, (), needs=reference_needs, compares="groups"
    ),
    "dpo": Algorithm(
        dpo.DPO,
        "completions",
        dpo.update,
        (),
        needs=lambda options: frozenset({"reference"}),
        compares="pairs",
    ),
    "ppo": Algorithm(token_ppo.PPO, "completions", token_ppo.update, (), needs=token_ppo.needs),
}
