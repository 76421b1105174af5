"""Reward functions as a user has them in a module; other processes import it without jax."""

import os
import time


def length(*, prompt, completion, answer, **columns):
    return len(completion)


def keywords(*, prompt, completion, answer, bonus):
    return float(prompt == "p1") + 2 * float(answer == "a1") + bonus


def platform(*, prompt, completion, answer):
    return float(os.environ["JAX_PLATFORMS"] == "cpu")


def awkward(*, prompt, completion, answer, **columns):
    """Does what its completion says."""
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "sleep":
        time.sleep(600)
    if completion == "exit":
        os._exit(3)
    odd = {"none": None, "nan": float("nan"), "text": "1", "large": 1e38, "huge": 10**400}
    return odd.get(completion, 1.5)


def at_odd_levels(*, prompt, completion, answer, level):
    """Fails for half of the records."""
    if level == 0:
        raise KeyError("no such level")
    return len(completion)


def never(*, prompt, completion, answer, **columns):
    raise ZeroDivisionError("always")
