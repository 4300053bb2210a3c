"""What a compiled program does on each device, read from the text of its optimised HLO.

XLA's own `cost_analysis` counts the body of a loop once, so that scanned layers, and matrix products that the
partitioner turned into loops of partial ones, hardly show. Here each body counts as often as it runs, where the text
tells how often; a loop of unknown length counts once and is reported. Of a conditional the dearest branch counts.
"""

import functools
import math
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of HLO. type: of the result; arguments: what is in the brackets; attributes: the rest of the line."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that this one reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


def summary(text: str) -> dict[str, Any]:
    """Of one device, for one run of the module whose text this is.

    Returns `flops`, of matrix products and convolutions (what a convolution pads is not counted); `collectives`, for
    each kind {"count", "bytes"}, bytes being those of the whole array that is gathered or reduced on a device;
    `kernels`, calls of hand-written kernels, whose operations are not known here; `unknown_loops`, executed loops of
    unknown length that hold any of these; `recomputed`, instructions that the compiler added to compute something again
    rather than to keep it.
    """
    entry, computations = parse(text)
    totals = _Cost(computations)(entry)
    collectives = {}
    for (kind, _, size), count in sorted(totals.collectives.items()):
        total = collectives.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += count
        total["bytes"] += int(count * size)
    return {
        "flops": float(totals.sums["flops"]),
        "collectives": collectives,
        "kernels": int(totals.sums["kernels"]),
        "unknown_loops": int(totals.sums["unknown_loops"]),
        "recomputed": len(re.findall(r"^\s*(?:ROOT )?%[\w\-]+(?:\.\d+)*\.remat\w*[.\d]* = ", text, re.MULTILINE)),
    }


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Name of the entry computation, and the instructions of every computation."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and " = " not in line.split("(")[0]:
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert head
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # attributes may run over lines that begin with one
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return entry, computations


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if opcode is None:
        return None
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    return Instruction(match[1], rest[:end], opcode[1], rest[start + 1 : stop], rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    return len(text)


class _Totals(NamedTuple):
    """sums: flops, kernels, unknown_loops. collectives: (kind, channel, bytes) -> how often.

    An asynchronous collective that is fused with what runs meanwhile is in the text several times, with one channel.
    """

    sums: Counter
    collectives: dict[tuple[str, str, float], int]

    def add(self, other: "_Totals", times: int = 1) -> None:
        for key, value in other.sums.items():
            self.sums[key] += value * times
        for key, count in other.collectives.items():
            self.collectives[key] = max(self.collectives.get(key, 0), count * times)


class _Cost:
    """function(name of a computation) -> _Totals, each computed once."""

    def __init__(self, computations):
        self.computations, self.known = computations, {}

    def __call__(self, name: str) -> _Totals:
        if name not in self.known:
            here = {each.name: each for each in self.computations[name]}
            totals = _Totals(Counter(), {})
            for each in here.values():
                totals.add(_own_cost(each, here))
                self._add_called(totals, each, here)
            self.known[name] = totals
        return self.known[name]

    def _add_called(self, totals: _Totals, each: Instruction, here: dict[str, Instruction]) -> None:
        called = dict(_CALLED.findall(each.attributes))
        if each.opcode == "while":
            body, trips = self(called["body"]), self._trips(each, here, called["body"], called["condition"])
            totals.add(body, 1 if trips is None else trips)
            totals.sums["unknown_loops"] += trips is None and bool(any(body.sums.values()) or body.collectives)
        elif each.opcode == "conditional":
            names = [called[key] for key in ("true_computation", "false_computation") if key in called]
            if branches := _BRANCHES.search(each.attributes):
                names += re.findall(r"%?([\w.\-]+)", branches[1])
            totals.add(max((self(name) for name in names), key=lambda each: each.sums["flops"]))
        elif not each.opcode.endswith(("-done", "-update")):  # counted where it starts
            for name in called.values():
                if name in self.computations:
                    totals.add(self(name))

    def _trips(self, loop: Instruction, here: dict[str, Instruction], body: str, condition: str) -> int | None:
        """How often a loop that counts up to a constant runs; None where the text does not tell."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        test, inside = self.computations[condition], {each.name: each for each in self.computations[body]}
        limits = [each for each in test if each.opcode == "constant" and each.type.startswith(("s32[]", "u32[]"))]
        places = [each.attributes for each in test if each.opcode == "get-tuple-element"]
        text = " ".join(each.attributes for name in [condition, *_fused(test)] for each in self.computations[name])
        if len(limits) != 1 or len(places) != 1 or "direction=LT" not in text:
            return None
        index = int(re.findall(r"index=(\d+)", places[0])[0])
        start = _constant(_element(here.get(loop.operands[0]), index, here), here)
        following = _element(self.computations[body][-1], index, inside)
        if start is None or following is None or following.opcode != "add":
            return None
        steps = [_constant(inside.get(name), inside) for name in following.operands]
        steps = [step for step in steps if step is not None]
        return max(-(-(int(limits[0].arguments) - start) // steps[0]), 0) if len(steps) == 1 and steps[0] > 0 else None


def _element(tuple_: Instruction | None, index: int, here: dict[str, Instruction]) -> Instruction | None:
    """The element of a tuple at this index, through copies of it."""
    found = here.get(tuple_.operands[index]) if tuple_ is not None and tuple_.opcode == "tuple" else None
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = here.get(found.operands[0])
    return found


def _constant(found: Instruction | None, here: dict[str, Instruction]) -> int | None:
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = here.get(found.operands[0])
    return int(found.arguments) if found is not None and found.opcode == "constant" else None


def _fused(instructions: list[Instruction]) -> list[str]:
    return [name for each in instructions for key, name in _CALLED.findall(each.attributes) if key == "calls"]


def _own_cost(each: Instruction, here: dict[str, Instruction]) -> _Totals:
    if each.opcode == "dot":
        return _Totals(Counter({"flops": _dot_flops(each, here)}), {})
    if each.opcode == "convolution":
        return _Totals(Counter({"flops": _convolution_flops(each, here)}), {})
    if each.opcode == "custom-call" and re.search(r'custom_call_target="(tpu_custom_call|__gpu\$\w+)', each.attributes):
        return _Totals(Counter(kernels=1), {})
    kind = each.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return _Totals(Counter(), {})
    given = sum(_size(here[name].type) for name in each.operands)
    result = _size(each.type)
    if each.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        result -= given  # the result of a start holds its operands, too
    channel = re.search(r"channel_id=(\d+)", each.attributes)
    return _Totals(Counter(), {(kind, channel[1] if channel else each.name, max(given, result)): 1})


def _shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _SHAPE.findall(type_text)]


def _size(type_text: str) -> float:
    """Bytes of an array or of a tuple of them."""
    return sum(_element_bytes(kind) * math.prod(shape) for kind, shape in _shapes(type_text))


def _element_bytes(kind: str) -> float:
    return _BYTES[kind] if kind in _BYTES else int(re.findall(r"\d+", kind)[0]) / 8


def _dims(name: str, attributes: str) -> list[int]:
    match = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in match[1].split(",") if n] if match else []


def _dot_flops(each: Instruction, here: dict[str, Instruction]) -> float:
    shape, left = _shapes(each.type)[0][1], _shapes(here[each.operands[0]].type)[0][1]
    return 2 * math.prod(shape) * math.prod(left[dim] for dim in _dims("lhs_contracting_dims", each.attributes))


def _convolution_flops(each: Instruction, here: dict[str, Instruction]) -> float:
    left, right, out = (_shapes(text)[0][1] for text in (*(here[name].type for name in each.operands[:2]), each.type))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    assert labels
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", each.attributes) or [""])[0]))
    total = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for index, size in enumerate(window.get("size", "").split("x") if "size" in window else ()):

        def option(name, default, index=index):
            return window[name].split("x")[index] if name in window else default

        total *= _pairs(
            left[labels[1].index(str(index))],
            out[labels[3].index(str(index))],
            int(size),
            low=int(option("pad", "0_0").split("_")[0]),
            stride=int(option("stride", 1)),
            left_dilation=int(option("lhs_dilate", 1)),
            right_dilation=int(option("rhs_dilate", 1)),
        )
    return total


@functools.lru_cache(maxsize=4096)
def _pairs(left: int, out: int, size: int, *, low: int, stride: int, left_dilation: int, right_dilation: int) -> int:
    """Along one axis: how often an element of the output meets one of the window with data, not padding, below it."""
    index = np.arange(out)[:, None] * stride + np.arange(size) * right_dilation - low
    return int(((index >= 0) & (index % left_dilation == 0) & (index // left_dilation < left)).sum())
