"""Which values of a program are stored in memory, and the kernels that compute them.

XLA fuses operations on elements into the operations that read them. The rule here is simple: a
value is stored if a matrix product, a loop or another heavy operation computes or reads it, if a
reduction computes it, or if more than one kernel would have to compute it. All others exist only
inside of the kernel that reads them.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from mmrl_jax.planning.program import ATTENTION, LOOPS, Op, Program, Value

# Operations that only change how an array is seen.
VIEWS = frozenset(
    "reshape squeeze expand_dims stop_gradient copy copy_p bitcast_convert_type device_put pvary "
    "sharding_constraint optimization_barrier random_wrap random_unwrap reduce_precision".split()
)
GENERATORS = frozenset(("broadcast_in_dim", "iota", "empty", "empty2"))
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin "
    "reduce".split()
)
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
HEAVY = PRODUCTS | frozenset(
    "all_gather sort top_k approx_top_k cumsum cumprod cummax cummin cumlogsumexp scatter "
    "scatter-add scatter-update scatter_add scatter_mul scatter_min scatter_max reduce_window "
    "select_and_scatter_add threefry2x32 random_bits random_seed random_split random_fold_in "
    "rng_bit_generator triangular_solve cholesky lu eigh qr svd custom_linear_solve "
    "lu_pivots_to_permutation householder_product fft pallas_call custom_partitioning".split()
) | frozenset(LOOPS)  # fmt: skip
IN_PLACE = frozenset(name for name in HEAVY if name.startswith("scatter"))


def is_heavy(op: Op) -> bool:
    """Returns whether an operation reads and computes stored arrays."""
    return op.name in HEAVY or op.name.startswith(ATTENTION)


@dataclasses.dataclass(slots=True, eq=False)
class Kernel:
    """A kernel that XLA is expected to make.

    Attributes:
      op: Heavy operation, reduction, or the operation of the last result; None for the results of a
        program that are stored at its end.
      outs: Values that it stores.
      reads: Stored values that it reads.
      fused: Whether it consists of operations on elements, so that a result may take the place of
        an operand.
    """

    op: Op | None
    outs: list[Value]
    reads: set[Value]
    fused: bool


def stored_root(x: Value, stored: set[Value]) -> Value:
    """Returns the value that a chain of views shows."""
    while x not in stored and x.op is not None and x.op.name in VIEWS:
        x = x.op.ins[x.op.outs.index(x)] if x.op.name == "optimization_barrier" else x.op.ins[0]
    return x


def make_kernels(program: Program, kept: Sequence[Value], stacked: Sequence[Value]) -> list[Kernel]:
    """Returns the kernels of a program in the order in which they run.

    Args:
      program: Operations.
      kept: Results that must be stored at the end.
      stacked: Results that are written into a larger array, so that they need not be stored.
    """
    return _Maker(program, kept, stacked).kernels


class _Maker:
    """See `make_kernels`."""

    def __init__(self, program: Program, kept: Sequence[Value], stacked: Sequence[Value]):
        self.kernels: list[Kernel] = []
        self._stored: set[Value] = {*program.ins, *program.consts}
        self._reads: dict[Value, frozenset[Value]] = {x: frozenset((x,)) for x in self._stored}
        self._shared = _shared(program, (*kept, *stacked))
        for op in program.ops:
            if is_heavy(op):
                self._heavy(op)
            elif op.name in REDUCTIONS:
                self._add(op, op.outs, self._all_reads(op.ins), fused=True)
            else:
                self._fusible(op)
        for x in kept:
            root = stored_root(x, self._stored)
            if root not in self._stored:
                self._add(None, [root], self._reads_of(root), fused=True)
        for x in stacked:
            root = stored_root(x, self._stored)
            if root not in self._stored:
                self.kernels.append(Kernel(None, [], set(self._reads_of(root)), True))

    def _reads_of(self, x: Value) -> frozenset[Value]:
        return self._reads.get(x, frozenset())

    def _all_reads(self, values: Sequence[Value]) -> frozenset[Value]:
        return frozenset().union(*map(self._reads_of, values)) if values else frozenset()

    def _add(self, op: Op | None, outs: list[Value], reads: Any, *, fused: bool) -> None:
        self.kernels.append(Kernel(op, list(outs), set(reads), fused))
        for x in outs:
            self._stored.add(x)
            self._reads[x] = frozenset((x,))

    def _fusible(self, op: Op) -> None:
        reads = self._all_reads(op.ins)
        for x in op.outs:
            self._reads[x] = reads
        if reads and any(x in self._shared for x in op.outs):
            self._add(op, op.outs, reads, fused=True)

    def _heavy(self, op: Op) -> None:
        """Stores the operands of a heavy operation, and adds its kernel."""
        first, end = op.carried() if op.name in ("scan", "while") else (0, len(op.ins))
        for i, x in enumerate(op.ins):
            root = stored_root(x, self._stored)
            if root in self._stored or (root.op is None and not root.shape):
                continue
            # What needs no input is computed in the body of a loop.
            if op.name in LOOPS and not self._reads_of(root) and not first <= i < end:
                continue
            if op.name == "cond" and not self._reads_of(root):
                continue
            self._add(op if root.op is None else root.op, [root], self._reads_of(root), fused=True)
        reads = self._all_reads([stored_root(x, self._stored) for x in op.ins])
        self._add(op, op.outs, reads, fused=False)


def _shared(program: Program, results: Sequence[Value]) -> set[Value]:
    """Returns the values of fusible operations that more than one kernel would compute.

    Operations are visited from the last to the first. A value has no reader, one kernel that reads
    it, or several. A value that several read is a kernel of its own for those before it.
    """
    readers: dict[Value, list[Any]] = {}
    for i, x in enumerate(results):
        readers.setdefault(x, []).append(("result", i))
    shared: set[Value] = set()
    for op in reversed(program.ops):
        kernel: Any = None
        for x in op.outs:
            kinds = set(readers.pop(x, ()))
            kernel = kinds.pop() if len(kinds) == 1 else ("several", id(x)) if kinds else None
            fusible = not is_heavy(op) and op.name not in REDUCTIONS | VIEWS
            several = kernel is not None and kernel[0] == "several"
            if several and op.name in GENERATORS:
                continue
            if fusible and several:
                shared.add(x)
            if fusible and kernel is not None and kernel[0] in ("several", "heavy", "result"):
                kernel = ("stored", id(x))
        if is_heavy(op):
            kernel = ("heavy", id(op))
        elif op.name in REDUCTIONS:
            kernel = ("reduction", id(op))
        if kernel is not None:
            for x in op.ins:
                readers.setdefault(x, []).append(kernel)
    return shared
