"""Tests of mmrl_jax.models.masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.models.masks import Mask, causal_mask

VALID = [False, True, True, True]  # Padding on the left.
POSITIONS = jnp.array([[0, 0, 1, 2]])
# Rows are queries, columns keys; x where a query may attend.
CASES = {
    "all": (Mask(), "xxxx xxxx xxxx xxxx"),
    "valid": (Mask(valid=jnp.array([VALID])), ".xxx .xxx .xxx .xxx"),
    "causal": (causal_mask(jnp.array([VALID])), ".... .x.. .xx. .xxx"),
    "segments": (Mask(segments=jnp.array([[0, 1, 1, 0]])), "x..x .xx. .xx. x..x"),
    "packed": (
        causal_mask(jnp.array([VALID])).replace(segments=jnp.array([[0, 0, 1, 1]])),
        ".... .x.. ..x. ..xx",
    ),
    # A window of two positions: the token itself and the one before it.
    "window": (
        causal_mask(jnp.array([VALID])).within(2, POSITIONS, POSITIONS),
        ".... .x.. .xx. ..xx",
    ),
    # The padding before a prefix may be marked as part of it, but is not attended to.
    "prefix": (
        causal_mask(jnp.array([VALID])).replace(prefix=jnp.array([[True, True, True, False]])),
        ".xx. .xx. .xx. .xxx",
    ),
    # A window of one position narrows all but the prefix.
    "prefix and window": (
        causal_mask(jnp.array([VALID]))
        .replace(prefix=jnp.array([[True, True, True, False]]))
        .within(1, POSITIONS, POSITIONS),
        ".xx. .xx. .xx. ...x",
    ),
    "readouts": (Mask(causal=True, readouts=2), "x... xx.. xxx. xx.x"),
    "explicit": (
        Mask(explicit=jnp.eye(4, dtype=bool)[None], valid=jnp.array([VALID])),
        ".... .x.. ..x. ...x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("queries", [4, 2])
def test_masks_by_hand(name, queries):
    mask, rows = CASES[name]
    expected = np.array([[c == "x" for c in row] for row in rows.split()])[-queries:]
    allowed = np.broadcast_to(mask.allowed(queries, 4), (1, queries, 4))
    np.testing.assert_array_equal(allowed[0], expected)


def test_no_window_changes_no_mask():
    mask = causal_mask(jnp.array([VALID]))
    assert mask.within(None, POSITIONS, POSITIONS) is mask
