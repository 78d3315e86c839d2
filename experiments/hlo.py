"""What a compiled program does on each device, read from its text: what its collectives send, and the FLOPs of its matmuls."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation. `shapes` of its results; `groups` of devices that take part together (for a permutation: pairs
    that differ); `axis` along which it gathers; `times` it runs in a step."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    result: int
    groups: tuple[tuple[int, ...], ...]
    axis: int | None
    times: int

    @property
    def payload(self) -> int:
        """Bytes of the whole array that one group works on, in a step."""
        return self.times * self.result * (len(self.groups[0]) if self.kind == "reduce-scatter" else 1)

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, on a ring of n: (n-1)/n of the payload, twice that to reduce and hand out."""
        if self.kind == "collective-permute":
            return self.payload
        n = len(self.groups[0])
        return self.payload * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program does on each device: its collectives that move anything, and the `flops` of its matmuls.

    What may run any number of times is left out, loops of unknown length and branches: `unknown` counts the collectives and
    `loops` the matmuls in them.
    """

    collectives: tuple[Collective, ...]
    flops: int
    unknown: int
    loops: int

    def payload(self, kinds: Sequence[str] = KINDS) -> int:
        """Bytes of all collectives of these kinds."""
        return sum(c.payload for c in self.collectives if c.kind in kinds)

    def sent(self, kinds: Sequence[str] = KINDS) -> float:
        """Bytes a device sends in collectives of these kinds."""
        return sum(c.sent for c in self.collectives if c.kind in kinds)


class _Instruction(NamedTuple):
    """`name = result operation(rest`; the result is a list of (element type, shape)."""

    name: str
    result: list[tuple[str, tuple[int, ...]]]
    operation: str
    rest: str


_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(condition|body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


def read(text: str, devices: int) -> Reading:
    """What an optimised program (HLO text, as XLA writes it for CPU) does on each of so many devices.

    Raises:
        ValueError: a collective whose groups are written in a way that is not known.
    """
    computations, times = _parse(text)
    collectives, flops, unknown, loops = [], 0, 0, 0
    for computation, body in computations.items():
        turns, results = times(computation), {i.name: i.result for i in body}
        for i in body:
            if i.operation == "dot":
                flops += _dot(i, results) * (turns or 0)
                loops += turns is None
            elif i.operation in KINDS and (groups := _groups(i.rest, devices)):
                unknown += turns is None
                size = sum(_width(dtype) * math.prod(shape) for dtype, shape in i.result)
                axis = re.search(r"dimensions=\{(\d+)\}", i.rest)
                shapes = tuple(shape for _, shape in i.result)
                collectives.append(Collective(i.operation, shapes, size, groups, int(axis[1]) if axis else None, turns or 0))
    return Reading(tuple(collectives), flops, unknown, loops)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], Callable[[str], int | None]]:
    """The computations of a program, and how often one runs in a step (None: that is not known)."""
    computations: dict[str, list[_Instruction]] = {}
    callers: dict[str, list[tuple[str, int | None]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = []
        elif found := _INSTRUCTION.match(line):
            computations[name].append(_Instruction(found[1], _shapes(found[2]), found[3], found[4]))
            trips = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line)
            for role, called in _CALLED.findall(line):
                turns = 1
                if role in ("body", "condition"):
                    turns = int(trips[1]) if trips else None
                elif found[3] == "conditional":
                    turns = None
                for callee in re.findall(r"[\w.-]+", called):
                    callers.setdefault(callee, []).append((name, turns))

    @cache
    def times(computation: str) -> int | None:
        total = int(computation == entry)
        for caller, turns in callers.get(computation, []):
            outer = times(caller)
            if outer is None or turns is None:
                return None
            total += outer * turns
        return total

    return computations, times


def _dot(i: _Instruction, results: dict[str, list[tuple[str, tuple[int, ...]]]]) -> int:
    """FLOPs of one matmul: twice its result's size times that of the axes it sums over."""
    ((_, out),), ((_, left),) = i.result, results[re.findall(r"%([\w.-]+)", i.rest)[0]]
    axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", i.rest)
    return 2 * math.prod(out) * (math.prod(left[a] for a in _numbers(axes[1])) if axes else 1)


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a result type, `f32[2,3]{1,0}` or a tuple of them: (element type, shape)."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(kind)]


def _width(dtype: str) -> int:
    """Bytes of one element."""
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1  # pred


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that talk to each other; none where each has only itself. Written as lists, as iotas, or as axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        listed = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)", pairs[1] + "}")]
        return tuple((a, b) for a, b in listed if a != b)
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})?\}", attributes):
        groups = [[int(n) for n in g.split(",")] for g in re.findall(r"[\d,]+\d|\d", (listed[1] or "").replace("},{", " "))]
        groups = groups or [list(range(devices))]
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups = _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    elif mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    ):
        names, sizes = zip(*(part.split("=") for part in mesh[1].split(",")), strict=True)
        axes = [names.index(name) for name in mesh[4].split(",") if name]
        ids = _iota(mesh[2] or str(devices), mesh[3]).reshape([int(n) for n in sizes])
        ids = np.moveaxis(ids, axes, range(-len(axes), 0))
        groups = ids.reshape(-1, math.prod(int(sizes[a]) for a in axes)).tolist()
    else:
        raise ValueError(f"groups of a collective not understood: {attributes[:200]}")
    return tuple(map(tuple, groups)) if len(groups[0]) > 1 else ()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(transpose)) if transpose else ids
