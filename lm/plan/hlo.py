"""What a compiled step says to other devices, read from its optimised text.

The text is a list of computations. An instruction runs as often as its computation is called: a
while loop calls its body as often as its trip count says, which a GPU's compiler writes beside the
loop, and which a TPU's leaves to be read from the loop's condition, `i < constant`. A TPU's
compiler cuts one collective into pieces that run beside products; pieces of one `channel_id` are
one.

A collective of S bytes (the whole that is gathered, reduced or scattered) over n devices brings
each of them

    all-gather, reduce-scatter, all-to-all   S (n - 1) / n        all-reduce   2 S (n - 1) / n

bytes. Where its group leaves the fast links, g of the n devices being on each side, the slow links
of the g carry S (1 - g / n) together.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from lm.plan.topology import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}  # s32, u8 and the like say theirs

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(calls|to_apply|body|condition|called_computations|branch_computations)=")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction: times it runs in a step, bytes of the whole, devices of a group
    and the distance between neighbours in it.
    """

    kind: str
    times: float
    size: int
    group: int
    stride: int

    @property
    def received(self) -> float:
        """Bytes that reach each device in a step."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.size * share * (2 if self.kind == "all-reduce" else 1)

    def seconds(self, topology: Topology) -> float:
        """Time of a step on the links, with nothing in their way and nothing beside them."""
        near = max(1, topology.fast_group // self.stride)
        fast = self.received / topology.chip.fast
        if self.group <= near:
            return fast
        rounds = 2 if self.kind == "all-reduce" else 1
        crossing = self.times * self.size * rounds * (1 - near / self.group)
        return max(fast, crossing / (near * topology.chip.slow))


def collectives(text: str, devices: int, steps: int = 1) -> list[Collective]:
    """The collectives of a program of `devices` that does `steps` steps, per step."""
    computations = _split(text)
    times = _times(computations)
    found: dict[tuple[str, str], Collective] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            match = _COLLECTIVE.search(line)
            if not match:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            key = match[2], channel[1] if channel else f"{name}:{number}"
            group, stride = _group(line, devices)
            size = _bytes(match[1], match[2], bool(match[3]), group)
            one = Collective(match[2], times.get(name, 0.0) / steps, size, group, stride)
            if group > 1 and (key not in found or one.times > found[key].times):
                found[key] = one
    return list(found.values())


def kernels(text: str) -> dict[str, int]:
    """How many calls of kernels that XLA did not write are in a program, by name."""
    names = re.findall(r'custom_call_target="([^"]+)"', text)
    known = ("tpu_custom_call", "__cudnn$fmha", "__gpu$xla.gpu.triton", "triton_kernel_call")
    return {n: names.count(n) for n in sorted(set(names)) if n.startswith(known)}


def _split(text: str) -> dict[str, list[str]]:
    """The lines of every computation; the entry's name is ""."""
    computations: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault("" if head[1] else head[2], [])
        else:
            current.append(line)
    return computations


def _times(computations: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation runs."""
    calls: dict[str, list[tuple[str, float]]] = {}
    for name, lines in computations.items():
        for line in lines:
            trips = _trip_count(line, computations) if " while(" in line else 1.0
            for callee in _callees(line):
                calls.setdefault(callee, []).append((name, trips))
    known: dict[str, float] = {"": 1.0}

    def visit(name: str) -> float:
        if name not in known:
            known[name] = 0.0  # a computation does not call itself
            known[name] = sum(visit(caller) * trips for caller, trips in calls.get(name, []))
        return known[name]

    return {name: visit(name) for name in computations}


def _callees(line: str) -> Iterable[str]:
    for match in _CALLED.finditer(line):
        rest = line[match.end() :]
        names = rest[1 : rest.index("}")] if rest.startswith("{") else re.split(r"[,\s]", rest)[0]
        yield from (n.strip().removeprefix("%") for n in names.split(","))


def _trip_count(line: str, computations: dict[str, list[str]]) -> float:
    if told := _TRIPS.search(line):
        return float(told[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    found = [int(m[1]) for m in map(_CONSTANT.search, lines) if m]
    return float(found[0]) if len(found) == 1 else 1.0


def _bytes(shape: str, kind: str, start: bool, group: int) -> int:
    """Bytes of the whole: what is gathered, reduced or scattered."""
    if not start or (kind == "all-reduce" and not shape.startswith("((")):
        return _size(shape) * (group if kind == "reduce-scatter" else 1)
    given, made = _elements(shape)[:2]  # an asynchronous start has (operands, results, ...)
    return _size(given if kind == "reduce-scatter" else made)


def _elements(shape: str) -> list[str]:
    """The outermost elements of a tuple's shape."""
    parts, depth = [""], 0
    for c in shape[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _size(shape: str) -> int:
    total = 0
    for dtype, sides in _SHAPE.findall(shape):
        width = SIZES.get(dtype)
        if width is None:
            bits = re.search(r"\d+", dtype)
            width = max(int(bits[0]) // 8, 1) if bits else 1
        total += width * math.prod(int(n) for n in sides.split(",") if n)
    return total


def _group(line: str, devices: int) -> tuple[int, int]:
    """Devices of a group and the distance between neighbours in it."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?(\{[^}]*\})?", line):
        axes = [(k, int(n)) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])]
        used = re.findall(r"'(\w+)'", named[2] or "") or [k for k, _ in axes]
        last = max(i for i, (k, _) in enumerate(axes) if k in used)
        stride = math.prod(n for _, n in axes[last + 1 :])
        return math.prod(n for k, n in axes if k in used), stride
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[[\d,]*\](T\()?", line):
        return int(iota[2]), int(iota[1]) if iota[3] else 1
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        ids = [int(i) for i in listed[1].split(",")]
        return len(ids), abs(ids[1] - ids[0]) if len(ids) > 1 else 1
    if re.search(r"source_target_pairs=", line):
        return devices, 1
    return devices, 1
