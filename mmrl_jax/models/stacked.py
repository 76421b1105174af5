"""Models whose blocks run in a loop, and the layout of the parameters of such blocks.

    blocks that are unrolled    stack/block_0/mlp_in/kernel [D, F], stack/block_1/..., ...
    blocks that are scanned     stack/blocks/mlp_in/kernel [L, D, F]

A program with a loop over the blocks contains one block, so that the time of its compilation does
not grow with the number of layers. Variables are initialized, read and written with unrolled
blocks, whose paths are those that configs and checkpoint formats name.
"""

from collections.abc import Callable, Iterator
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrl_jax.distributed.partition import BLOCKS

STACK = "stack"  # Name of the stack of blocks in every module that has the field `scan`.


def with_scan(model: nn.Module, scan: bool) -> nn.Module:
    """Returns a model in which the blocks of all stacks that support it are scanned, or unrolled.

    Args:
      model: Model with submodules as fields, for example a `VisionLanguageModel`.
      scan: Whether to scan the blocks.
    """
    changes: dict[str, Any] = {
        name: with_scan(part, scan) for name, part in _submodules(model) if _stacks(part)
    }
    if hasattr(model, "scan"):
        # A tower that uses the tokens between its blocks stays unrolled.
        changes["scan"] = scan and not getattr(model, "deepstack", ())
    return model.clone(**changes) if changes else model


def stack(variables: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Stacks the variables of the blocks that a model scans.

    Each array is made of those of the layers at once, so that at any time the memory holds the
    stacked and the separate arrays of one parameter only. The separate arrays are deleted.

    Args:
      variables: Variables with unrolled blocks, as collections of nested dicts of arrays or, inside
        `jax.eval_shape`, of tracers.
      model: Model whose scanned blocks are stacked.

    Returns:
      Variables in the layout that the model reads.

    Raises:
      ValueError: Layers differ in their variables, for example because not all have adapters.
    """
    return _converted(variables, model, _stack_blocks)


def unstack(variables: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Undoes `stack`, except that the stacked arrays are not deleted."""
    return _converted(variables, model, _unstack_blocks)


def layer_paths(path: str, leaf: Any) -> list[str]:
    """Returns the paths that a variable has when blocks are unrolled.

    Args:
      path: Path of the variable, for example 'params/stack/blocks/mlp_in/kernel'.
      leaf: Variable, whose first dimension is the layer if its block is scanned.
    """
    pattern = rf"(^|/){BLOCKS}/"
    if not re.search(pattern, path):
        return [path]
    return [re.sub(pattern, rf"\1block_{i}/", path) for i in range(leaf.shape[0])]


def _submodules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name in model.__dataclass_fields__:
        part = getattr(model, name, None)
        if name not in ("parent", "name") and isinstance(part, nn.Module):
            yield name, part


def _stacks(model: nn.Module) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the path of each stack that supports scanning, and the module that it belongs to."""
    own = [((STACK,), model)] if hasattr(model, "scan") else []
    return own + [
        ((name, *path), owner) for name, part in _submodules(model) for path, owner in _stacks(part)
    ]


def _converted(
    variables: dict[str, Any], model: nn.Module, convert: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    for path, owner in _stacks(model):
        if owner.scan:
            variables = {
                name: _at(tree, path, functools.partial(convert, layers=owner.layers))
                for name, tree in variables.items()
            }
    return variables


def _at(
    tree: dict[str, Any],
    path: tuple[str, ...],
    convert: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Returns a nested dict with the one at a path converted, if there is one."""
    if not path:
        return convert(tree)
    if path[0] not in tree:
        return tree
    return tree | {path[0]: _at(tree[path[0]], path[1:], convert)}


def _stack_blocks(tree: dict[str, Any], layers: int) -> dict[str, Any]:
    names = [f"block_{i}" for i in range(layers)]
    if not any(name in tree for name in names):
        return tree
    for name in names[1:]:
        if _shapes(tree.get(name)) != _shapes(tree.get(names[0])):
            raise ValueError(
                f"model.scan_layers=True, but the variables of {name} differ from those of "
                f"{names[0]}: give all layers of a stack the same adapters and dtypes, or set it "
                "to False."
            )
    others = {name: x for name, x in tree.items() if name not in names}
    return others | {BLOCKS: jax.tree.map(_stack_arrays, *(tree[name] for name in names))}


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def _stack_arrays(*layers: jax.Array) -> jax.Array:
    if any(isinstance(x, jax.core.Tracer) for x in layers):
        return jnp.stack(layers)
    sharding = layers[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(None, *sharding.spec)
        sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    else:
        sharding = None
    stacked = jax.jit(lambda *x: jnp.stack(x), out_shardings=sharding)(*layers)
    for x in layers:
        x.delete()
    return stacked


def _unstack_blocks(tree: dict[str, Any], layers: int) -> dict[str, Any]:
    if BLOCKS not in tree:
        return tree
    others = {name: x for name, x in tree.items() if name != BLOCKS}
    return others | {
        f"block_{i}": jax.tree.map(lambda x, i=i: x[i], tree[BLOCKS]) for i in range(layers)
    }
