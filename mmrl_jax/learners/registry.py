"""The registry of algorithms.

An algorithm is a frozen dataclass of options, the kind of experience that it learns from, and a
pure update. Its name is the name of its stage and of its group in a config. A new algorithm needs
only an entry in the registry, which can be added in a file of the user:

    registry.CONTROL["my_ppo"] = registry.Algorithm(
        options=MyPPO, experience="rollout", update=my_update, console=("loss/policy",)
    )
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mmrl_jax.learners import awr, bc, dapg, dpo, entropy_bonus, grpo, iql, ppo, rnd, sft, token_ppo
from mmrl_jax.learners.policy_gradient import reference_needs


class Algorithm(NamedTuple):
    """An algorithm, from which a problem builds a stage.

    Attributes:
      options: Dataclass of the hyperparameters, see `config.options`.
      experience: Kind of experience that the algorithm learns from. For control policies it is
        'rollout' (`learner.Rollout`), 'demonstrations' (`bc.Batch`), 'one_step' (the same, with
        value targets of one reward) or 'demonstrated_rollout' (`dapg.DemonstratedRollout`), for
        token policies 'completions' or 'labels'
        (`token_learner.ScoredCompletions` with or without rewards).
      update: Function (learner, batch, key, *, apply, optimizer, options, shard) that returns the
        new learner and metrics; for token policies (learner, frozen, batch, key, *, ...). It is
        traced into the compiled update. Its metrics must have 'optimizer/steps' and
        'optimizer/skipped_steps', see `learner.apply_gradients`.
      console: Names of the metrics that are printed on the console.
      prepare: Function of parameters and options that returns the initial parameters of the stage.
      extras: Function of the options, of an observation [1, ...] of any values, of the shapes of
        the network's output for it, and of a PRNG key; it returns what the algorithm has beside the
        policy as a dictionary of pytrees, the initial `extras` of the learner. For token policies
        all but the options are None.
      needs: Function of the options of an algorithm for token policies; it returns the names of
        what the algorithm needs in addition to the policy, 'value_head' or 'reference'.
      compares: Completions of a prompt that an algorithm for token policies compares, all of a
        group or pairs. Agents have one completion in each turn, which can be compared to nothing.
      check: Function of the options of the algorithm, of its optimizer and of the rollbacks of the
        stage, and of the name of the stage; it raises ValueError for options that contradict each
        other.
    """

    options: type
    experience: str
    update: Callable[..., tuple[Any, Any]]
    console: tuple[str, ...]
    prepare: Callable[[Any, Any], Any] = lambda params, options: params
    extras: Callable[[Any, Any, Any, Any], Any] = lambda options, observation, output, rng: {}
    needs: Callable[[Any], frozenset[str]] = lambda options: frozenset()
    compares: Literal["nothing", "groups", "pairs"] = "nothing"
    check: Callable[[Any, Any, Any, str], None] = lambda options, optimizer, rollback, name: None


def _with_std(params: Any, options: ppo.PPO) -> Any:
    return ppo.with_std(params, options.initial_std)


def _ppo_extras(options: ppo.PPO, observation: Any, output: Any, rng: Any) -> dict[str, Any]:
    return ppo.extras(options)


def _entropy_extras(options: Any, observation: Any, output: Any, rng: Any) -> dict[str, Any]:
    return entropy_bonus.extras(options)


CONTROL: dict[str, Algorithm] = {
    "bc": Algorithm(bc.BC, "demonstrations", bc.update, ("loss/bc", "loss/pointing")),
    "awr": Algorithm(
        awr.AWR, "demonstrations", awr.update, ("loss/awr", "policy/effective_sample_size")
    ),
    "iql": Algorithm(
        iql.IQL,
        "one_step",
        iql.update,
        ("loss/awr", "loss/critic"),
        extras=iql.extras,
    ),
    "ppo": Algorithm(
        ppo.PPO,
        "rollout",
        ppo.update,
        ("episode/return", "episode/success"),
        prepare=_with_std,
        extras=_ppo_extras,
        check=ppo.check,
    ),
    "dapg": Algorithm(
        dapg.DAPG,
        "demonstrated_rollout",
        dapg.update,
        ("episode/return", "episode/success", "loss/bc"),
        prepare=_with_std,
        extras=_ppo_extras,
        check=ppo.check,
    ),
    "rnd": Algorithm(
        rnd.RND,
        "rollout",
        rnd.update,
        ("episode/return", "episode/success", "exploration/novelty"),
        prepare=_with_std,
        extras=rnd.extras,
        check=ppo.check,
    ),
}

TOKEN: dict[str, Algorithm] = {
    "sft": Algorithm(sft.SFT, "labels", sft.update, ("loss/sft",)),
    # The same algorithm under a second name, with which a run can first align a projector on other
    # labels.
    "align": Algorithm(sft.SFT, "labels", sft.update, ("loss/sft",)),
    "grpo": Algorithm(
        grpo.GRPO,
        "completions",
        grpo.update,
        (),
        extras=_entropy_extras,
        needs=reference_needs,
        compares="groups",
    ),
    "dpo": Algorithm(
        dpo.DPO,
        "completions",
        dpo.update,
        (),
        needs=lambda options: frozenset({"reference"}),
        compares="pairs",
    ),
    "ppo": Algorithm(
        token_ppo.PPO,
        "completions",
        token_ppo.update,
        (),
        extras=_entropy_extras,
        needs=token_ppo.needs,
    ),
}
