"""Layout and checksums of the leaves of a carry, which are stored in checkpoints and verified.

Orbax does not detect a changed byte inside the array files. The layout of each leaf therefore has a
CRC-32 in addition to shape and dtype.
"""

from collections.abc import Mapping
import json
from typing import Any
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from mmrl_jax.distributed import mesh as mesh_lib

PyTree = Any

_MAX_LISTED = 20


class CheckpointMismatch(ValueError):
    """The checkpoint is of another model: its paths, shapes, dtypes or key kinds differ."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a pytree by their paths, for example "params/dense/kernel"."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"Two leaves have the path '{name}': rename a key that contains '/'.")
        named[name] = leaf
    return named


def _is_typed_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> str:
    """Returns the name of the implementation of a typed key, for example "threefry2x32"."""
    kinds = []
    # key_impl does not accept a ShapeDtypeStruct, but a traced key of the same dtype.
    jax.eval_shape(
        lambda key: kinds.append(str(jax.random.key_impl(key))),
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    )
    return kinds[0]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _is_visible(array: Any) -> bool:
    """Returns whether this process holds all of an array."""
    on_host = isinstance(array, np.ndarray)
    return on_host or array.is_fully_addressable or array.is_fully_replicated


def json_crc(body: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of a mapping as JSON, which does not depend on the order of its keys."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def snapshot(carry: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes a snapshot of a carry that a later donation of the carry does not invalidate.

    Hazard: on CPU, `np.asarray(x)`, which Orbax also calls, is a view of the buffer of x. While
    such a view exists, JAX silently copies instead of donating x. The view is therefore taken of a
    copy. On other platforms the transfer to the host is the snapshot, and no second carry is
    allocated on the device.

    Args:
      carry: Pytree of JAX or numpy arrays.

    Returns:
      Arrays to write by their paths, and the layout by the same paths: shape, dtype, crc32 and the
      kind of a typed key.

    Raises:
      ValueError: If a leaf is not an array or is weakly typed.
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
                    f"Carry leaf '{path}' is weakly typed, which a file cannot store, so that a "
                    "resumed run would compile another program: give it a dtype, as in "
                    "jnp.float32(0)."
                )
            if any(device.platform == "cpu" for device in leaf.devices()):
                leaf = jnp.copy(leaf)
        entry["shape"] = list(leaf.shape)
        entry["dtype"] = str(leaf.dtype)
        # No process sees all of an array that is split over several, so that it has no checksum.
        entry["crc32"] = _crc(jax.device_get(leaf)) if _is_visible(leaf) else None
        layout[path] = entry
        # Orbax does not write empty arrays, which are restored from the layout alone.
        if leaf.size:
            arrays[path] = leaf
    return arrays, layout


def target_sharding(target: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding of a restored leaf; None for a host array or an uncommitted array."""
    if isinstance(target, np.ndarray):
        return None
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def finish_leaf(path: str, array: Any, target: Any, entry: Mapping[str, Any]) -> Any:
    """Verifies a restored array and converts it to the type of its target.

    Args:
      path: Path of the leaf, for error messages.
      array: Restored array; None for an empty array, which is not stored.
      target: Target leaf, see `Checkpointer.restore_latest`.
      entry: Layout of the leaf.

    Returns:
      A numpy array, JAX array or typed key, like the target.

    Raises:
      ValueError: If the checksum is wrong.
    """
    if array is None:
        array = np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
        sharding = target_sharding(target)
        if sharding is not None:
            array = mesh_lib.put(array, sharding)
    if entry["crc32"] is not None and _is_visible(array):
        if _crc(jax.device_get(array)) != entry["crc32"]:
            raise ValueError(f"the checksum of '{path}' is wrong")
    if isinstance(target, np.ndarray):
        return np.asarray(array)
    # The array is copied, because the checksum has created a numpy view, which prevents donation.
    sharding = target_sharding(target)
    array = (
        jnp.array(array, copy=True)
        if sharding is None
        else jax.device_put(array, sharding, may_alias=False)
    )
    return jax.random.wrap_key_data(array, impl=entry["key"]) if "key" in entry else array


def check_layout(
    layout: Mapping[str, Any], targets: Mapping[str, Any], *, checkpoint: epath.Path
) -> None:
    """Compares the saved leaves with their targets.

    Args:
        layout: Layout of the saved leaves by their paths.
        targets: Target leaves by their paths.
        checkpoint: Path of the checkpoint for the error message.

    Raises:
        CheckpointMismatch: If paths, shapes, dtypes or kinds of keys differ. The message lists up
            to 20 paths with shape and dtype on both sides.
    """
    lines = []
    for path in sorted(layout.keys() | targets.keys()):
        saved = _describe_entry(layout[path]) if path in layout else "absent"
        expected = _describe_leaf(path, targets[path]) if path in targets else "absent"
        if saved != expected:
            lines.append(f"  {path}: {saved} in the checkpoint, {expected} in the model")
    if lines:
        more = [f"  and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        if any(line.startswith("  rng: ") for line in lines):
            impl = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
            more.append(
                f"The PRNG keys differ: jax_default_prng_impl is {impl!r} now; set it to the value "
                "with which the run began."
            )
        raise CheckpointMismatch(
            f"Checkpoint {checkpoint} is of another model; {len(lines)} paths differ:\n"
            + "\n".join(lines[:_MAX_LISTED] + more)
            + "\nGive the config with which the checkpoint was made, or a fresh workdir."
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
