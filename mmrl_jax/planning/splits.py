"""How the mesh axes 'fsdp' and 'tensor' split the arrays of a program, and what is exchanged.

Programs are those of one device with its share of the samples, so that only parameters are split
when a program begins. From them the split of every other array follows, as XLA's partitioner would
derive it:

  forwards    a product with a matrix whose outputs are split over 'tensor' has a split result; a
              sum over a split dimension is a sum over devices; a matrix is gathered over 'fsdp'
              before its product
  backwards   a gradient has the split of the optimizer state that it meets
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from mmrl_jax.distributed.mesh import FSDP, TENSOR
from mmrl_jax.planning.kernels import PRODUCTS, REDUCTIONS
from mmrl_jax.planning.program import LOOPS, Op, Program, Split, Value, product_flops

_SAME_RANK = frozenset(
    "slice dynamic_slice pad rev cumsum cumprod cummax cummin cumlogsumexp sort".split()
)


def ways(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    """Returns into how many parts some axes of a mesh split a dimension."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def local_shape(x: Value, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of the part of an array that a device holds."""
    return tuple(-(-n // ways(axes, mesh)) for n, axes in zip(x.shape, x.split, strict=True))


def local_flops(op: Op, mesh: Mapping[str, int]) -> float:
    """Returns the FLOPs of a device for a product of split arrays."""
    axes = {axis for x in (*op.ins, *op.outs) for dim in x.split for axis in dim}
    return product_flops(op) / (mesh.get(TENSOR, 1) if TENSOR in axes else 1)


def exchanges(op: Op, mesh: Mapping[str, int]) -> dict[str, float]:
    """Returns the bytes that a device sends for an operation, by kind, with rings of devices."""
    if not op.outs or math.prod(mesh.values()) == 1:
        return {}
    out, fsdp, tensor = op.outs[0], mesh.get(FSDP, 1), mesh.get(TENSOR, 1)
    size = _nbytes(local_shape(out, mesh), out)
    if op.name == "all_gather":
        return {"all-gather": size * (fsdp - 1) / fsdp}
    sent: dict[str, float] = {}
    if op.name == "dot_general":
        (left, right), _ = op.params["dimension_numbers"]
        split = [op.ins[0].split[i] for i in left] + [op.ins[1].split[i] for i in right]
        if any(TENSOR in axes for axes in split) and tensor > 1:
            sent["all-reduce"] = 2 * size * (tensor - 1) / tensor
    if op.name == "gather" and any(op.ins[0].split):
        sent["all-reduce"] = 2 * size
    if fsdp > 1 and any(FSDP in axes for axes in out.split) and _computes_whole(op):
        sent["reduce-scatter"] = size * (fsdp - 1)
    return sent


def _computes_whole(op: Op) -> bool:
    """Returns whether the operation computes the sum of a gradient over all samples."""
    return op.name in PRODUCTS or op.name in REDUCTIONS or op.name.startswith("scatter")


def _nbytes(shape: Sequence[int], x: Value) -> float:
    dtype = getattr(x.aval, "dtype", None)
    try:
        return float(math.prod(shape) * np.dtype(dtype).itemsize)
    except TypeError:  # A PRNG key.
        return 8.0 * math.prod(shape)


def propagate(program: Program, mesh: Mapping[str, int]) -> None:
    """Derives the splits of all arrays from those of the arguments, and adds the gathers.

    Args:
      program: Operations, whose arguments have splits. It is changed.
      mesh: Sizes of the axes of the mesh.
    """
    if mesh.get(FSDP, 1) * mesh.get(TENSOR, 1) == 1:
        return
    _forward(program)
    _backward(program, {})
    _forward(program)
    _gather(program)


# -- Forwards --------------------------------------------------------------------------------------


def _forward(program: Program) -> None:
    for op in program.ops:
        if op.name in LOOPS:
            _loop_forward(op)
            continue
        for x in op.outs:
            x.split = _merged(x.split, _derived(op, x))


def _merged(first: Split, second: Split) -> Split:
    """Returns, for each dimension, the axes of the first split, or else of the second.

    An axis splits one dimension only.
    """
    used = {axis for axes in first for axis in axes}
    merged = []
    for a, b in zip(first, second, strict=True):
        axes = a or tuple(axis for axis in b if axis not in used)
        used.update(axes)
        merged.append(axes)
    return tuple(merged)


def _none(x: Value) -> Split:
    return ((),) * len(x.shape)


def _derived(op: Op, out: Value) -> Split:
    """Returns the split of a result that follows from those of the operands."""
    name = op.name
    if not op.ins or not any(any(x.split) for x in op.ins):
        return _none(out)
    first = op.ins[0]
    if name == "dot_general":
        return _product(op)
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(first, out.shape)
    if name == "transpose":
        return tuple(first.split[i] for i in op.params["permutation"])
    if name == "step_slice":
        return first.split[1:]
    if name == "broadcast_in_dim":
        split = list(_none(out))
        for i, j in enumerate(op.params["broadcast_dimensions"]):
            if first.shape[i] == out.shape[j]:
                split[j] = first.split[i]
        return tuple(split)
    if name in REDUCTIONS and name != "reduce":
        axes = op.params["axes"]
        return tuple(s for i, s in enumerate(first.split) if i not in axes)
    if name == "concatenate":
        split = _none(out)
        for x in op.ins:
            split = _merged(split, x.split)
        dimension = op.params["dimension"]
        return tuple(() if i == dimension else s for i, s in enumerate(split))
    if name in _SAME_RANK and len(first.shape) == len(out.shape):
        return first.split
    if name in ("dynamic_update_slice", "optimization_barrier"):
        return op.ins[op.outs.index(out)].split
    if all(x.shape in ((), out.shape) for x in op.ins):
        split = _none(out)
        for x in op.ins:
            if x.shape == out.shape:
                split = _merged(split, x.split)
        return split
    # A kernel keeps the split of an operand of the same shape, such as the queries of attention.
    return next((x.split for x in op.ins if x.shape == out.shape), _none(out))


def _product(op: Op) -> Split:
    """Returns the split of a product: matrices are whole along 'fsdp' when they are multiplied."""
    (contracted, (left_batch, right_batch)) = op.params["dimension_numbers"]
    left, right = (_without_fsdp(x.split) for x in op.ins[:2])
    batch = tuple(left[i] or right[j] for i, j in zip(left_batch, right_batch, strict=True))
    free = [
        split[i]
        for split, summed, shared in (
            (left, contracted[0], left_batch),
            (right, contracted[1], right_batch),
        )
        for i in range(len(split))
        if i not in summed and i not in shared
    ]
    return _merged(((),) * len(op.outs[0].shape), (*batch, *free))


def _without_fsdp(split: Split) -> Split:
    return tuple(tuple(axis for axis in axes if axis != FSDP) for axes in split)


def _reshaped(x: Value, shape: tuple[int, ...]) -> Split:
    """Returns the split of a reshaped array: that of the first of the joined dimensions."""
    split: list[tuple[str, ...]] = [()] * len(shape)
    i = j = 0
    while i < len(x.shape) and j < len(shape):
        start_i, start_j = i, j
        size_i, size_j = x.shape[i], shape[j]
        while size_i != size_j:
            if size_i < size_j:
                i += 1
                size_i *= x.shape[i]
            else:
                j += 1
                size_j *= shape[j]
        first = next((k for k in range(start_i, i + 1) if x.shape[k] > 1), start_i)
        target = next((k for k in range(start_j, j + 1) if shape[k] > 1), start_j)
        split[target] = x.split[first]
        i, j = i + 1, j + 1
    return tuple(split)


def _loop_forward(op: Op) -> None:
    for body, operands in zip(op.bodies, op.body_operands(), strict=True):
        for x, y in zip(body.ins, operands, strict=True):
            x.split = _merged(x.split, y.split)
        _forward(body)
    for i, x in enumerate(op.outs):
        split = op.bodies[0].outs[i].split
        stacked = len(split) < len(x.shape)
        x.split = _merged(x.split, ((), *split) if stacked else split)


# -- Backwards -------------------------------------------------------------------------------------


def _backward(program: Program, wanted: dict[Value, Split]) -> None:
    """Gives arrays the split of what they are combined with, from the last to the first.

    Args:
      program: Operations.
      wanted: Splits that arrays should have; those of arguments are added.
    """

    def want(x: Value, split: Split) -> None:
        if any(split) and not any(x.split) and len(split) == len(x.shape):
            wanted.setdefault(x, split)

    for op in reversed(program.ops):
        if op.name in LOOPS:
            _loop_backward(op, wanted, want)
            continue
        out = op.outs[0]
        split = wanted.get(out) or out.split
        if not any(split):
            continue
        if out in wanted:
            out.split = split
        if op.name in ("reshape", "squeeze", "expand_dims"):
            want(op.ins[0], _reshaped(Value(out.aval, split=split), op.ins[0].shape))
        elif op.name == "transpose":
            permutation = op.params["permutation"]
            inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
            want(op.ins[0], tuple(split[i] for i in inverse))
        elif op.name not in PRODUCTS:
            for x in op.ins:
                if x.shape == out.shape:
                    want(x, split)


def _loop_backward(op: Op, wanted: dict[Value, Split], want: Any) -> None:
    for body, operands in zip(op.bodies, op.body_operands(), strict=True):
        inner: dict[Value, Split] = {}
        for out, x in zip(op.outs, body.outs, strict=False):
            split = wanted.get(out) or out.split
            if out in wanted:
                out.split = split
            if len(split) > len(x.shape):
                split = split[1:]
            if any(split) and not any(x.split):
                inner[x] = split
        _backward(body, inner)
        for x, operand in zip(body.ins, operands, strict=True):
            split = inner.get(x) or x.split
            if x in inner:
                x.split = split
            want(operand, split)


# -- Gathers ---------------------------------------------------------------------------------------


def _gather(program: Program) -> None:
    """Adds the gathers of matrices before their products."""
    ops: list[Op] = []
    for op in program.ops:
        for body in op.bodies:
            _gather(body)
        if op.name in PRODUCTS:
            for i, x in enumerate(op.ins):
                if any(FSDP in axes for axes in x.split):
                    whole = Value(x.aval, split=_without_fsdp(x.split))
                    gather = Op("all_gather", {}, [x], [whole], op.scope)
                    whole.op = gather
                    ops.append(gather)
                    op.ins[i] = whole
        ops.append(op)
    program.ops = ops
