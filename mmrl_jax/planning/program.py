"""A traced program as a flat list of operations, as XLA sees it before it fuses them.

Calls of other functions are replaced by the operations in them, equal operations are merged, and
operations without an effect on the results are dropped. Loops and branches remain, see `usage`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params
from jax.interpreters import partial_eval
import numpy as np

# Parameter of a call that has the called function, by the name of the primitive.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
LOOPS = ("scan", "while", "cond")
STEP_SLICE = "step_slice"  # The part of a stacked array that a step of a loop reads.
ATTENTION = "dot_product_attention"  # Start of the names of cuDNN's attention.
# Name of the scope of what a backward pass repeats to save memory.
RECOMPUTED = "rematted_computation"
# Integer arithmetic by which the number of steps of a loop is found.
_ARITHMETIC: Mapping[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
    "convert_element_type": lambda a: a,
    "copy": lambda a: a,
    "broadcast_in_dim": lambda a: a,
}
Split = tuple[tuple[str, ...], ...]  # Mesh axes over which each dimension of an array is split.


class Value:
    """An array of a program.

    Attributes:
      aval: Shape and dtype.
      op: Operation that computes it; None for an input or a constant.
      known: Its number, if it is an integer that is known before the program runs.
      split: Mesh axes over which each dimension is split.
    """

    __slots__ = ("aval", "known", "op", "split")

    def __init__(self, aval: Any, known: int | None = None, split: Split | None = None):
        self.aval, self.known = aval, known
        self.op: Op | None = None
        self.split: Split = split or ((),) * len(getattr(aval, "shape", ()))

    @property
    def shape(self) -> tuple[int, ...]:
        return getattr(self.aval, "shape", ())


@dataclasses.dataclass(slots=True, eq=False)
class Op:
    """An operation of a program.

    Attributes:
      name: Name of the primitive.
      params: Parameters of the primitive.
      ins: Operands.
      outs: Results.
      scope: Names of the scopes and modules in which it is traced, separated by '/'.
      is_repeated: Whether it repeats an earlier operation, in order to save memory.
      repetitions: Number of repetitions of it that are not operations of the program.
      bodies: Body of a loop, or the branches of a condition. Stacked operands of a loop are
        arguments as a whole, and an operation STEP_SLICE returns the part of a step.
    """

    name: str
    params: Mapping[str, Any]
    ins: list[Value]
    outs: list[Value]
    scope: str
    is_repeated: bool = False
    repetitions: int = 0
    bodies: list["Program"] = dataclasses.field(default_factory=list)

    def carried(self) -> tuple[int, int]:
        """Returns the indices of the first carried operand of a loop and of the first after it."""
        if self.name == "scan":
            first = self.params["num_consts"]
            return first, first + self.params["num_carry"]
        return self.params["cond_nconsts"] + self.params["body_nconsts"], len(self.ins)

    def body_operands(self) -> list[list[Value]]:
        """Returns the operands that are the arguments of each body."""
        if self.name == "cond":
            return [self.ins[1:]] * len(self.bodies)
        return [self.ins[self.params["cond_nconsts"] :] if self.name == "while" else self.ins]


@dataclasses.dataclass
class Program:
    """Operations of a function.

    Attributes:
      ins: Arguments.
      consts: Arrays that are part of the program.
      ops: Operations, in the order in which they were traced.
      outs: Results.
    """

    ins: list[Value]
    consts: list[Value]
    ops: list[Op]
    outs: list[Value]


def simplified(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Returns a program without the operations that do not affect its results."""
    jaxpr, _ = partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True
    )
    return ClosedJaxpr(jaxpr, closed.consts)


def flatten(closed: ClosedJaxpr, ins: Sequence[Value], platform: str) -> Program:
    """Returns the operations of a traced program on a platform.

    What a backward pass repeats to save memory (`jax.checkpoint`) is not repeated on 'cpu': XLA's
    CPU compiler runs it so early that its results are in memory as long as the first ones. Its
    FLOPs are counted.

    Args:
      closed: Traced program.
      ins: Its arguments.
      platform: Platform that the program is lowered for, 'cpu', 'cuda' or 'tpu'.
    """
    flattener = _Flattener(platform)
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, ins, strict=True))
    env |= {v: flattener.constant(c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    flattener.add(jaxpr, env, "")
    outs = [flattener.stored(flattener.read(env, x)) for x in jaxpr.outvars]
    return Program(list(ins), list(flattener.consts.values()), _used(flattener.ops, outs), outs)


def _used(ops: list[Op], outs: list[Value]) -> list[Op]:
    """Returns the operations on which the results depend."""
    needed, kept = {id(x) for x in outs}, []
    for op in reversed(ops):
        if any(id(x) in needed for x in op.outs):
            kept.append(op)
            needed.update(id(x) for x in op.ins)
    return kept[::-1]


class _Flattener:
    """Collects the operations of a program; see `flatten`.

    A value of a recomputation differs from the first one, which is its original. Operations are
    equal if their operands are, and repeated if the originals of their operands are equal.
    """

    def __init__(self, platform: str):
        self.ops: list[Op] = []
        self.consts: dict[int, Value] = {}
        self._platform, self._keep = platform, platform != "cpu"
        self._originals: dict[Value, Value] = {}
        self._equal: dict[Any, list[Value]] = {}
        self._first: dict[Any, Op] = {}
        self._literals: dict[Any, Value] = {}

    def constant(self, x: Any) -> Value:
        known = int(x) if _is_integer(x) else None
        return self.consts.setdefault(id(x), Value(jax.typeof(x), known))

    def read(self, env: Mapping[Any, Value], atom: Any) -> Value:
        """Returns the value of a variable or literal."""
        if not isinstance(atom, Literal):
            return env[atom]
        known = int(atom.val) if _is_integer(atom.val) else None
        key = (str(atom.val), str(atom.aval))
        return self._literals.setdefault(key, Value(atom.aval, known))

    def stored(self, x: Value) -> Value:
        """Returns the value that is in memory for a value of the program."""
        return x if self._keep else self._originals.get(x, x)

    def add(self, jaxpr: Jaxpr, env: dict[Any, Value], scope: str) -> None:
        """Adds the operations of a function, whose variables `env` maps to values."""
        for eqn in jaxpr.eqns:
            ins = [self.read(env, x) for x in eqn.invars]
            inner = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
            name = eqn.primitive.name
            if name in _CALLS:
                outs = self._call(eqn.params[_CALLS[name]], ins, inner, eqn.params)
            elif name == "scan" and eqn.params["length"] == 1:
                outs = self._single_step(eqn, ins, inner)
            elif name == "platform_index":
                outs = [Value(eqn.outvars[0].aval, self._platform_index(eqn.params["platforms"]))]
            elif name == "cond" and ins[0].known is not None:
                outs = self._call(eqn.params["branches"][ins[0].known], ins[1:], inner, {})
            else:
                outs = self._operation(eqn, ins, inner)
            env.update(zip(eqn.outvars, outs, strict=True))

    def _call(
        self, called: Any, ins: list[Value], scope: str, params: Mapping[str, Any]
    ) -> list[Value]:
        jaxpr, consts = (
            (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else (called, ())
        )
        if params.get("differentiated") and params.get("prevent_cse"):
            ins = [self._again(x, scope) for x in ins]
        env = dict(zip(jaxpr.invars, ins, strict=True))
        env |= {v: self.constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        self.add(jaxpr, env, scope)
        return [self.read(env, x) for x in jaxpr.outvars]

    def _platform_index(self, platforms: Sequence[Sequence[str] | None]) -> int:
        """Returns the index of the platform's branch; the branch of None is for all others."""
        matching = (i for i, names in enumerate(platforms) if names and self._platform in names)
        return next(matching, platforms.index(None) if None in platforms else 0)

    def _again(self, x: Value, scope: str) -> Value:
        """Returns a value for a recomputation."""
        again = Value(x.aval, x.known)
        self._originals[again] = self._originals.get(x, x)
        if self._keep:
            self._append(Op("optimization_barrier", {}, [x], [again], scope))
        return again

    def _single_step(self, eqn: Any, ins: list[Value], scope: str) -> list[Value]:
        """Replaces a loop of one step by its body, as XLA does."""
        params, body = eqn.params, eqn.params["jaxpr"]
        first = params["num_consts"] + params["num_carry"]
        variables = body.jaxpr.invars
        ins = [
            x if i < first else self._reshaped(x, v.aval, scope)
            for i, (x, v) in enumerate(zip(ins, variables, strict=True))
        ]
        outs = self._call(body, ins, scope, {})
        return [
            x if i < params["num_carry"] else self._reshaped(x, v.aval, scope)
            for i, (x, v) in enumerate(zip(outs, eqn.outvars, strict=True))
        ]

    def _reshaped(self, x: Value, aval: Any, scope: str) -> Value:
        out = Value(aval)
        self._append(Op("reshape", {"new_sizes": aval.shape}, [self.stored(x)], [out], scope))
        return out

    def _operation(self, eqn: Any, ins: list[Value], scope: str) -> list[Value]:
        name, outs = eqn.primitive.name, [Value(v.aval) for v in eqn.outvars]
        op = Op(name, eqn.params, [self.stored(x) for x in ins], outs, scope)
        if name in LOOPS:
            op.bodies = self._bodies(op)
        if name in LOOPS or eqn.effects:
            self._append(op)
            return outs
        text = _text(eqn.params)
        key = (name, tuple(map(id, ins)), text)
        if key in self._equal:
            return self._equal[key]
        self._equal[key] = outs
        original = (name, tuple(id(self._originals.get(x, x)) for x in ins), text)
        op.is_repeated = RECOMPUTED in scope
        first = self._first.get(original)
        if first is None:
            self._first[original] = op
        else:
            self._originals.update(zip(outs, first.outs, strict=True))
            if not self._keep:
                first.repetitions += 1
                return outs
        self._append(op)
        return outs

    def _bodies(self, op: Op) -> list[Program]:
        """Returns the bodies of a loop, or the branches of a condition."""
        if op.name == "cond":
            return [
                flatten(branch, [Value(x.aval, x.known) for x in op.ins[1:]], self._platform)
                for branch in op.params["branches"]
            ]
        first, end = op.carried()
        closed = op.params["jaxpr" if op.name == "scan" else "body_jaxpr"]
        operands = op.body_operands()[0]
        skipped = len(op.ins) - len(operands)
        ins, sources, slices = [], [], []
        for i, (x, v) in enumerate(zip(operands, closed.jaxpr.invars, strict=True), skipped):
            # The numbers that a loop carries change from step to step.
            sources.append(Value(x.aval, x.known if i < first else None))
            ins.append(sources[-1])
            if i >= end:
                ins[-1] = Value(v.aval)
                slices.append(Op(STEP_SLICE, {}, [sources[-1]], [ins[-1]], ""))
                ins[-1].op = slices[-1]
        body = flatten(closed, ins, self._platform)
        return [Program(sources, body.consts, [*slices, *body.ops], body.outs)]

    def _append(self, op: Op) -> None:
        for x in op.outs:
            x.op = op
        numbers = [x.known for x in op.ins]
        if op.name in _ARITHMETIC and None not in numbers and op.outs[0].shape == ():
            op.outs[0].known = _ARITHMETIC[op.name](*numbers)
        self.ops.append(op)


def _is_integer(x: Any) -> bool:
    return np.ndim(x) == 0 and np.issubdtype(getattr(x, "dtype", type(x)), np.integer)


def _text(params: Mapping[str, Any]) -> str:
    """Returns a text that is equal for equal parameters of an operation."""
    return str(sorted((name, str(x)) for name, x in params.items() if name != "sharding"))


def trip_count(op: Op) -> int | None:
    """Returns the largest number of steps of a while loop that counts up; None if it is unknown."""
    condition = op.params["cond_jaxpr"]
    jaxpr, first = condition.jaxpr, op.params["cond_nconsts"] + op.params["body_nconsts"]
    operands = [*op.ins[: op.params["cond_nconsts"]], *op.ins[first:]]
    numbers = {v: x.known for v, x in zip(jaxpr.invars, operands, strict=True)}
    numbers |= {
        v: int(c) if _is_integer(c) else None
        for v, c in zip(jaxpr.constvars, condition.consts, strict=True)
    }

    def number(atom: Any) -> int | None:
        if isinstance(atom, Literal):
            return int(atom.val) if _is_integer(atom.val) else None
        return numbers.get(atom)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "lt":
            start, end = map(number, eqn.invars)
            if start is not None and end is not None:
                return max(end - start, 0)
    return None


def product_flops(op: Op) -> float:
    """Returns the FLOPs of the matrix products of an operation on whole arrays.

    A product of [m, k] and [k, n] has 2 * m * k * n.
    """
    if op.name == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        size = math.prod(op.ins[0].shape[i] for i in contracted)
        return 2.0 * math.prod(op.outs[0].shape) * size
    if op.name == "conv_general_dilated":
        kernel = op.ins[1].shape
        features = kernel[op.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(op.outs[0].shape) * math.prod(kernel) / features
    if op.name == "pallas_call":
        grid = op.params["grid_mapping"].grid
        return math.prod(grid) * _nested_flops(op.params["jaxpr"])
    if op.name.startswith(ATTENTION):
        # Two products forwards, [B, Q, N, H] with [B, S, K, H], and five backwards.
        query, key = op.ins[0].shape, op.ins[1].shape
        products = 5 if "bwd" in op.name else 2
        return products * 2.0 * math.prod(query) * key[1]
    return 0.0


def _nested_flops(jaxpr: Jaxpr) -> float:
    """Returns the FLOPs of a step of a kernel: of conditions, those of the larger branch."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [_nested_flops(x) for x in jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(inner)
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif eqn.primitive.name == "dot_general":
            ins = [Value(x.aval) for x in eqn.invars]
            total += product_flops(
                Op("dot_general", eqn.params, ins, [Value(eqn.outvars[0].aval)], "")
            )
        else:
            total += sum(inner)
    return total
