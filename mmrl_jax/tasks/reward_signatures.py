"""The two signatures of reward functions, which are told apart by their parameters.

    def ours(*, prompt, completion, answer, finished, **columns) -> float: ...
    def trl(prompts, completions, completion_ids, answer, **columns) -> list[float | None]: ...

The first is called for one completion. The second is that of TRL's `GRPOTrainer`: it is called for
all completions of a prompt, every argument is a list with one item for each of them, and None in
its result marks a completion to which the function does not apply.
"""

from collections.abc import Callable, Collection, Mapping
import functools
import inspect
from typing import Any, NamedTuple

RewardFunction = Callable[..., Any]

# Arguments of every call, which cannot be names of columns: for one completion, and for a list.
SINGLE = ("prompt", "completion", "answer", "finished")
BATCHED = ("prompts", "completions", "completion_ids")
RESERVED = SINGLE + BATCHED
# Arguments in SINGLE that a function with TRL's signature gets too, as lists.
SHARED = ("answer", "finished")
# Arguments of TRL that belong to its trainer, and columns that stay in the training process.
NOT_PASSED = ("trainer_state", "log_extra", "log_metric", "environments", "image", "images")


class Signature(NamedTuple):
    """What a reward function is called with.

    Attributes:
      batched: Whether the function has TRL's signature.
      required: Names of the parameters without a default.
      optional: Names of those with a default.
      accepted: Names of all keyword arguments that it takes; None if it takes any.
    """

    batched: bool
    required: tuple[str, ...]
    optional: frozenset[str]
    accepted: frozenset[str] | None

    def accepts(self, name: str) -> bool:
        """Returns whether the function takes a keyword argument."""
        return self.accepted is None or name in self.accepted


def read_signature(name: str, function: RewardFunction) -> Signature:
    """Returns the signature of a reward function.

    A function has TRL's signature if it has a parameter in `BATCHED`, and ours otherwise. Functions
    in C may have no signature that Python knows; they are taken to have ours.

    Args:
      name: Name of the function in rewards.functions, for messages.
      function: The function, or another callable object.

    Raises:
      ValueError: If it cannot be called with keyword arguments, is asynchronous, has parameters of
        both signatures, or needs an argument that is never passed.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    ):
        raise ValueError(
            f"rewards.functions has {name!r}, which is asynchronous; wrap it in a function that "
            "returns asyncio.run(...) of it: its calls run in rewards.workers processes anyway."
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return Signature(False, (), frozenset(), None)
    required = tuple(
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    )
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY and p.name in required:
            raise ValueError(
                f"rewards.functions has {name!r}, whose parameter {p.name!r} is positional only, "
                "but arguments are passed by their names; remove the '/' after it."
            )
    names = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
    accepted = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else frozenset(names)
    batched = any(x in BATCHED for x in names)
    for parameter in required:
        if batched and parameter in SINGLE and parameter not in SHARED:
            raise ValueError(
                f"rewards.functions has {name!r} with the parameters {names}, of which "
                f"{parameter!r} is for one completion and {[x for x in names if x in BATCHED]} "
                "are lists as in TRL; name the parameters of one of the two signatures."
            )
        if parameter in NOT_PASSED:
            raise ValueError(
                f"rewards.functions has {name!r}, whose parameter {parameter!r} is not passed to "
                f"reward functions here; give it a default, such as {parameter}=None."
            )
    optional = frozenset(p.name for p in parameters if p.default is not p.empty)
    return Signature(batched, required, optional, accepted)


def check_columns(name: str, signature: Signature, columns: Collection[str]) -> None:
    """Checks that the records have what a reward function needs.

    Args:
      name: Name of the function in rewards.functions, for messages.
      signature: Signature of the function.
      columns: Names of the columns that at least one record has.

    Raises:
      ValueError: If the function has a parameter without a default that no record gives.
    """
    passed = (*BATCHED, *SHARED) if signature.batched else SINGLE
    for parameter in signature.required:
        if parameter not in passed and parameter not in columns:
            raise ValueError(
                f"rewards.functions has {name!r}, whose parameter {parameter!r} is neither one of "
                f"{list(passed)} nor a column of the records, which are {sorted(columns)}; add the "
                "column to the records, set it in rewards.options, or give it a default."
            )


def with_options(name: str, function: RewardFunction, options: Mapping[str, Any]) -> RewardFunction:
    """Returns a reward function with further keyword arguments bound.

    Args:
      name: Name of the function in rewards.functions, for messages.
      function: The function.
      options: Values of some of its parameters. A column of a record replaces them, unless its
        value is None.

    Raises:
      ValueError: If the signature of the function is invalid, see `read_signature`, or a name in
        `options` is not one of its parameters or an argument of every call.
    """
    read_signature(name, function)
    if not options:
        return function
    parameters = inspect.signature(function).parameters
    free = [
        p.name
        for p in parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in RESERVED
    ]
    for option in options:
        if option not in free:
            raise ValueError(
                f"rewards.options has {option!r} for {name!r}, whose parameters for options are "
                f"{free}; give one of these."
            )
    bound = functools.partial(function, **options)
    if hasattr(function, "on_failure"):
        bound.on_failure = function.on_failure  # type: ignore[attr-defined]
    return bound
