"""Memory, FLOPs and time of a traced program on a chip, from the lifetimes of its arrays."""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax
from jax.extend.core import ClosedJaxpr
import jax.numpy as jnp
import numpy as np

from mmrl_jax.planning import splits
from mmrl_jax.planning.chips import Chip
from mmrl_jax.planning.kernels import (
    IN_PLACE,
    Kernel,
    make_kernels,
    stored_root,
)
from mmrl_jax.planning.program import (
    LOOPS,
    STEP_SLICE,
    Op,
    Program,
    Value,
    flatten,
    trip_count,
)

_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
LISTED = 8  # Number of arrays at the peak that are listed.


@dataclasses.dataclass
class Usage:
    """What a program, or a part of it, needs on one device.

    Attributes:
      peak: Largest sum of the bytes of all arrays at a time, without its arguments.
      flops: FLOPs of matrix products.
      model_flops: The same without the products that a backward pass repeats to save memory.
      moved: Bytes that kernels read and write.
      kernels: Number of kernels that run.
      seconds: Estimate of the time: of each kernel, the larger of the times of its products and of
        its memory traffic, and that of a launch; and the time of its exchange with other devices.
      exchanged: Bytes of the results of exchanges between devices, by their kind.
      arrays: Largest arrays at the peak, as (bytes, description).
      unknown: Scopes of the loops whose number of steps is unknown, and was taken as 1.
    """

    peak: float = 0.0
    flops: float = 0.0
    model_flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    seconds: float = 0.0
    exchanged: Counter[str] = dataclasses.field(default_factory=Counter)
    arrays: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    unknown: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Usage", times: float = 1.0) -> None:
        """Adds the work, not the peak, of a part that runs several times."""
        for name in ("flops", "model_flops", "moved", "kernels", "seconds"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for kind, size in other.exchanged.items():
            self.exchanged[kind] += times * size  # type: ignore[assignment]
        self.unknown |= other.unknown


@dataclasses.dataclass
class Parts:
    """Usage of a program, as a whole and of each of its outermost scopes."""

    whole: Usage
    scopes: dict[str, Usage]


class Analyzer:
    """Analyzes programs for a chip and a mesh.

    Args:
      chip: Device.
      mesh: Sizes of the axes of the mesh. Programs are those of one device with its share of the
        samples; only the parameters may be split, see `splits`.
    """

    def __init__(self, chip: Chip, mesh: Mapping[str, int]):
        self.chip, self.mesh = chip, dict(mesh)

    def program(self, closed: ClosedJaxpr, ins: Sequence[Value], donated: int) -> Parts:
        """Analyzes a whole program.

        Args:
          closed: Program, see `program.simplified`.
          ins: Its arguments.
          donated: Number of first arguments whose memory the first results take.
        """
        program = flatten(closed, ins, _PLATFORMS[self.chip.kind])
        splits.propagate(program, self.mesh)
        scopes: dict[str, Usage] = {}
        whole = self._walk(
            program, program.ins[:donated], program.outs, [], inside=False, scopes=scopes
        )
        return Parts(whole, scopes)

    # -- Sizes -------------------------------------------------------------------------------------

    def nbytes(self, x: Value) -> float:
        """Returns the bytes of an array on one device."""
        shape = splits.local_shape(x, self.mesh)
        dtype = getattr(x.aval, "dtype", np.dtype(np.float32))
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return 8.0 * math.prod(shape)
        size = np.dtype(dtype).itemsize
        is_input = x.op is None
        # XLA's CPU compiler computes bfloat16 in float32.
        if self.chip.kind == "cpu" and dtype == jnp.bfloat16 and not is_input:
            size = 4
        if self.chip.kind == "tpu":
            shape = padded(shape, size)
        return float(size * math.prod(shape))

    # -- Lifetimes ---------------------------------------------------------------------------------

    def _walk(
        self,
        program: Program,
        owned: list[Value],
        kept: Sequence[Value],
        stacked: Sequence[Value],
        *,
        inside: bool,
        scopes: dict[str, Usage] | None = None,
    ) -> Usage:
        """Follows the arrays of a program from the kernel that stores them to the last that reads.

        Args:
          program: Operations.
          owned: Arguments whose memory the program may reuse, and which count as its arrays. Their
            bytes are not part of the returned peak.
          kept: Results that are stored until the end.
          stacked: Results that are written into a larger array as soon as they are computed.
          inside: Whether the program is the body of a loop.
          scopes: Dictionary to which the usage of each outermost scope is added.
        """
        kernels = make_kernels(program, kept, stacked)
        stored = {*program.ins, *program.consts, *(x for k in kernels for x in k.outs)}
        last: dict[Value, int] = {x: i for i, k in enumerate(kernels) for x in k.reads}
        last |= {stored_root(x, stored): len(kernels) for x in kept}
        dying: dict[int, list[Value]] = {}
        for x, i in last.items():
            dying.setdefault(i, []).append(x)
        constant = self._invariant(program, owned) if inside else set()
        usage, live = Usage(), {x: self.nbytes(x) for x in owned}
        hoisted = self._relaid(program)
        current = start = sum(live.values())
        largest: tuple[dict[Value, float], list[tuple[float, str]]] = ({}, [])
        usage.peak = current
        for i, kernel in enumerate(kernels):
            inner = self._kernel(kernel, stored)
            usage.add(inner)
            dead = [x for x in dying.get(i, ()) if x in live]
            for x in self._reused(kernel, dead, live, stored):
                current -= live.pop(x)
            for x in kernel.outs:
                size = self.nbytes(x)
                if x in constant and self._hoists(x):
                    hoisted += size
                elif x not in live:
                    live[x] = size
                    current += size
            total = current + inner.peak
            if scopes is not None:
                part = scopes.setdefault(_scope(kernel), Usage())
                part.add(inner)
                part.peak = max(part.peak, total - start)
            if total > usage.peak:
                usage.peak = total
                largest = dict(live), inner.arrays
            for x in (*dying.get(i, ()), *(x for x in kernel.outs if last.get(x, -1) < i)):
                if x in live:
                    current -= live.pop(x)
        usage.peak += hoisted - start
        found = [*largest[1], *((size, _describe(x)) for x, size in largest[0].items())]
        usage.arrays = sorted(found, key=lambda pair: -pair[0])[:LISTED]
        return usage

    def _reused(
        self, kernel: Kernel, dead: list[Value], live: Mapping[Value, float], stored: set[Value]
    ) -> list[Value]:
        """Returns the operands, read for the last time, whose memory the results take."""
        op = kernel.op
        if not kernel.fused and op is not None and op.name in ("scan", "while"):
            first, end = op.carried()
            roots = {stored_root(x, stored) for x in op.ins[first:end]}
            return [x for x in dead if x in roots]
        if not kernel.fused and (op is None or op.name not in IN_PLACE):
            return []
        taken: list[Value] = []
        for x in kernel.outs:
            size = self.nbytes(x)
            same = [y for y in dead if live[y] == size and y not in taken]
            taken += same[:1]
        return taken

    def _relaid(self, program: Program) -> float:
        """Returns the bytes of copies of the data sets from which a TPU gathers samples.

        Tiles that cover the samples save padding, but a gather needs tiles inside of each sample.
        """
        if self.chip.kind != "tpu":
            return 0.0
        copies: dict[Value, float] = {}
        for op in program.ops:
            source = op.ins[0] if op.name == "gather" else None
            if source is None or source.op is not None:
                continue
            axis = max(op.params["dimension_numbers"].start_index_map, default=0) + 1
            sample = tuple(n for n in source.shape[axis:] if n > 1)
            if len(sample) > 1:
                itemsize = np.dtype(source.aval.dtype).itemsize
                tiles = padded(sample, itemsize)
                size = float(itemsize * math.prod((*source.shape[:axis], *tiles)))
                if size > self.nbytes(source):
                    copies[source] = size
        return sum(copies.values())

    def _invariant(self, program: Program, owned: Sequence[Value]) -> set[Value]:
        """Returns the values of the body of a loop that are the same in each step."""
        constant = {*program.consts, *program.ins} - set(owned)
        for op in program.ops:
            # Neither crosses a barrier, nor is a matrix gathered before the loop that uses it.
            fixed = op.name not in ("optimization_barrier", "all_gather", STEP_SLICE)
            if fixed and all(x in constant or (x.op is None and not x.shape) for x in op.ins):
                constant.update(op.outs)
        return constant

    def _hoists(self, x: Value) -> bool:
        """Returns whether XLA computes an array that is the same in each step before a loop."""
        return self.chip.kind == "cpu" and x.op is not None and x.op.name not in LOOPS

    # -- Kernels -----------------------------------------------------------------------------------

    def _kernel(self, kernel: Kernel, stored: set[Value]) -> Usage:
        """Returns the usage of one kernel, without the arrays that it reads and stores."""
        op = kernel.op
        if not kernel.fused and op is not None and op.name in LOOPS:
            return self._loop(op)
        usage = Usage(kernels=1.0)
        usage.moved = sum(map(self.nbytes, {*kernel.reads, *kernel.outs}))
        seconds = usage.moved / self.chip.bandwidth
        if not kernel.fused and op is not None:
            once = splits.local_flops(op, self.mesh)
            usage.flops = once * (1 + op.repetitions)
            usage.model_flops = 0.0 if op.is_repeated else once
            seconds = max(seconds, usage.flops / self._peak_flops(op))
            usage.peak = _workspace(op) * sum(map(self.nbytes, op.outs))
            for kind, size in splits.exchanges(op, self.mesh).items():
                usage.exchanged[kind] += size  # type: ignore[assignment]
                seconds += size / self.chip.link
        usage.seconds = seconds + self.chip.launch_s
        return usage

    def _peak_flops(self, op: Op) -> float:
        wide = any(getattr(x.aval, "dtype", None) == jnp.float32 for x in op.ins)
        return self.chip.flops32 if wide else self.chip.flops

    def _loop(self, op: Op) -> Usage:
        if op.name == "cond":
            branches = [self._walk(b, [], b.outs, [], inside=False) for b in op.bodies]
            most = max(branches, key=lambda usage: usage.flops)
            results = sum(map(self.nbytes, op.outs))
            peak = max(0.0, *(branch.peak - results for branch in branches))
            return dataclasses.replace(most, peak=peak)
        steps = op.params["length"] if op.name == "scan" else trip_count(op)
        (body,), (first, end) = op.bodies, op.carried()
        skipped, count = len(op.ins) - len(body.ins), end - first
        carry = body.ins[first - skipped : end - skipped]
        step = self._walk(body, carry, body.outs[:count], body.outs[count:], inside=True)
        usage = Usage(peak=step.peak, arrays=step.arrays)
        usage.add(step, 1 if steps is None else steps)
        if steps is None:
            usage.unknown.add(op.scope)
        return usage


# Memory of XLA's own loops for random numbers and sorting, in units of their results.
_WORKSPACE = {"random_bits": 2.0, "sort": 1.0}


def _workspace(op: Op) -> float:
    return _WORKSPACE.get(op.name, 0.0)


def padded(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Returns a shape as a TPU stores it, in tiles of 8 x 128 words of 32 bits.

    XLA chooses which dimensions a tile covers; here they are the two for which padding adds least.

    Args:
      shape: Shape of an array.
      itemsize: Bytes of an element.
    """
    if not shape:
        return (1,)
    rows = 8 * max(4 // itemsize, 1)
    best = None
    for i, lanes in enumerate(shape):
        wide = -(-lanes // 128) * 128
        others = [(j, n) for j, n in enumerate(shape) if j != i]
        if not others:
            candidates = [(wide,)]
        else:
            candidates = [
                tuple(wide if k == i else -(-n // rows) * rows if k == j else shape[k]
                      for k in range(len(shape)))
                for j, n in others
            ]  # fmt: skip
        for candidate in candidates:
            if best is None or math.prod(candidate) < math.prod(best):
                best = candidate
    assert best is not None
    return best


def _scope(kernel: Kernel) -> str:
    return "" if kernel.op is None else kernel.op.scope.partition("/")[0]


def _describe(x: Value) -> str:
    """Returns the shape of an array and where it is computed, for a list."""
    op = x.op
    where = "an argument" if op is None else f"{op.name} in {op.scope or 'the program'}"
    return f"{x.aval.dtype}{list(x.shape)}, {where}"
