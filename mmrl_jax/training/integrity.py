"""What a checkpoint holds of each leaf of a carry: its layout, and a checksum that is verified.

Orbax does not notice a changed byte inside the files of arrays. Each leaf therefore has a CRC-32
beside its shape and dtype.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

_MAX_LISTED = 20


class CheckpointMismatch(ValueError):
    """The checkpoint is of another model: its paths, shapes, dtypes or key kinds differ."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns {path: leaf}, as {"params/dense/kernel": ...}."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"Two leaves have the path '{name}': rename a key that holds '/'.")
        named[name] = leaf
    return named


def _is_typed_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> str:
    """Returns the name of a typed key's implementation, as "threefry2x32"."""
    kinds = []
    # key_impl takes no ShapeDtypeStruct; a traced key has the same dtype.
    jax.eval_shape(
        lambda key: kinds.append(str(jax.random.key_impl(key))),
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    )
    return kinds[0]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def json_crc(body: Mapping[str, Any]) -> int:
    """Returns the checksum of what JSON makes of a body, whatever the order of its keys."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def snapshot(carry: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({path: array to write}, {path: shape, dtype, crc32, and a key's kind}).

    Hazard: on CPU `np.asarray(x)`, which Orbax calls too, is a view of x's own buffer. While such
    a view lives, a donation of x is silently not done (JAX copies instead), so the live carry
    must not be touched; its copy is. Elsewhere the transfer to the host is itself the snapshot,
    and no second carry is held on the device.
    """
    arrays: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    for path, leaf in named_leaves(carry).items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise ValueError(
                f"Carry leaf '{path}' is {leaf!r} ({type(leaf).__name__}): make it an array."
            )
        entry: dict[str, Any] = {}
        if _is_typed_key(leaf):
            entry["key"] = _key_kind(leaf)
            leaf = jax.random.key_data(leaf)
        # Orbax copies numpy arrays itself.
        if isinstance(leaf, jax.Array):
            if leaf.weak_type:
                raise ValueError(
                    f"Carry leaf '{path}' is weakly typed, which no file keeps, and a resumed run "
                    "would compile another program: give it a dtype, as in jnp.float32(0)."
                )
            if any(device.platform == "cpu" for device in leaf.devices()):
                leaf = jnp.copy(leaf)
        entry["shape"] = list(leaf.shape)
        entry["dtype"] = str(leaf.dtype)
        whole = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable
        # Of an array that spans hosts no process sees all; those files stay without a checksum.
        entry["crc32"] = _crc(jax.device_get(leaf)) if whole else None
        layout[path] = entry
        # Orbax writes no empty arrays; the layout is all there is to know of one.
        if leaf.size:
            arrays[path] = leaf
    return arrays, layout


def target_sharding(target: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding to restore with; None for a host array or an uncommitted one."""
    if isinstance(target, np.ndarray):
        return None
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def finish_leaf(path: str, array: Any, target: Any, entry: Mapping[str, Any]) -> Any:
    """Verifies one restored array and gives it the target's kind (numpy, jax, typed key)."""
    if array is None:
        array = np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
        sharding = target_sharding(target)
        if sharding is not None:
            array = jax.device_put(array, sharding)
    if entry["crc32"] is not None and (isinstance(array, np.ndarray) or array.is_fully_addressable):
        if _crc(jax.device_get(array)) != entry["crc32"]:
            raise ValueError(f"the checksum of '{path}' is wrong")
    if isinstance(target, np.ndarray):
        return np.asarray(array)
    # A copy: JAX does not donate what numpy holds a view of, as it does since the checksum.
    sharding = target_sharding(target)
    array = (
        jnp.array(array, copy=True)
        if sharding is None
        else jax.device_put(array, sharding, may_alias=False)
    )
    return jax.random.wrap_key_data(array, impl=entry["key"]) if "key" in entry else array


def check_layout(
    layout: Mapping[str, Any], targets: Mapping[str, Any], *, place: pathlib.Path
) -> None:
    """Compares the saved leaves with the wanted ones.

    Raises:
        CheckpointMismatch: Lists up to 20 differing paths with shape and dtype on both sides.
    """
    lines = []
    for path in sorted(layout.keys() | targets.keys()):
        saved = _describe_entry(layout[path]) if path in layout else "absent"
        wanted = _describe_leaf(path, targets[path]) if path in targets else "absent"
        if saved != wanted:
            lines.append(f"  {path}: {saved} in the checkpoint, {wanted} in the model")
    if lines:
        more = [f"  and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        if any(line.startswith("  rng: ") for line in lines):
            config: Any = jax.config  # Its type does not know this setting.
            more.append(
                "The random keys differ: jax_default_prng_impl is "
                f"{config.jax_default_prng_impl!r} now; set it to what it "
                "was when the run began."
            )
        raise CheckpointMismatch(
            f"Checkpoint {place} is of another model; {len(lines)} paths differ:\n"
            + "\n".join(lines[:_MAX_LISTED] + more)
            + "\nGive the config that made the checkpoint, or a fresh workdir."
        )


def _describe_entry(entry: Mapping[str, Any]) -> str:
    kind = f" ({entry['key']} key)" if "key" in entry else ""
    return f"{entry['dtype']}{list(entry['shape'])}{kind}"


def _describe_leaf(path: str, leaf: Any) -> str:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(f"Target leaf '{path}' is {leaf!r}: give an array or ShapeDtypeStruct.")
    if _is_typed_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        entry = {"dtype": data.dtype, "shape": data.shape, "key": _key_kind(leaf)}
    else:
        entry = {"dtype": np.dtype(leaf.dtype), "shape": leaf.shape}
    return _describe_entry(entry)
