"""What a compiled program does between devices, read from the text of its HLO.

XLA decides which collectives a partitioned program needs, so they are counted where they are
final: in the optimised module. A loop's body stands in the text once and runs many times; where
XLA knows how often, its collectives are counted that often.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0}

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$")
_NAME = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_WITH_LAYOUT = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_NUMBER = re.compile(r"(\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIMS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# Results that are names for memory, not traffic.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
# Runs computations whose instructions are kernels by themselves.
_SEQUENCES = {"while", "conditional", "call"}
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# What a kernel of our own says about itself; its body is not HLO.
_SAID = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: its name.
        shape: text of the result's type.
        opcode: operation.
        rest: operands and attributes.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def source(self) -> str:
        """Where in the traced function it comes from; empty where XLA made it."""
        found = _SOURCE.search(self.rest)
        return found.group(1) if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of what goes in."""
        return _OPERAND.findall(self.rest[: _end_of_operands(self.rest)])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        groups = _CALLED.findall(self.rest)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]

    @property
    def turns(self) -> int | None:
        """How often a loop runs, where that is known; 1 for everything else."""
        if self.opcode != "while":
            return 1
        found = _TURNS.search(self.rest)
        return int(found.group(1)) if found else None


class _Part(NamedTuple):
    """A computation where the program runs it.

    Attributes:
        instructions: its lines.
        times: how often it runs.
        exact: as for `Collective`.
        kernels: whether its instructions are kernels, as in the entry, loops and branches; what
            runs inside a kernel, such as a fusion, is not.
    """

    instructions: list[Instruction]
    times: int
    exact: bool
    kernels: bool


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        nbytes: size of its result on one device, bytes, each time.
        times: how often it runs.
        exact: False where it stands in a loop whose length depends on the data: `times` then
            counts one turn of that loop.
        source: where in the traced function it comes from.
    """

    kind: str
    nbytes: int
    times: int
    exact: bool
    source: str


class Cost(NamedTuple):
    """What one kernel takes, each time it runs.

    Attributes:
        source: where in the traced function it comes from.
        flops: operations of its products and convolutions.
        nbytes: bytes that it reads from and writes to the device's main memory.
        times: how often it runs.
        exact: as for `Collective`.
    """

    source: str
    flops: int
    nbytes: int
    times: int
    exact: bool


class Program:
    """A compiled module: its computations by name and how often each of them runs."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self._computations.setdefault(header.group(2), [])
                self._entry = header.group(2) if header.group(1) else self._entry
            elif instruction := _parse(line):
                current.append(instruction)
        if not self._entry:
            raise ValueError("this text has no ENTRY computation: it is no HLO module")

    def instructions(self) -> Iterator[Instruction]:
        """Yield every instruction of the text once."""
        for computation in self._computations.values():
            yield from computation

    def collectives(self) -> list[Collective]:
        """Return every exchange between devices."""
        found = []
        for part in self._parts(self._entry):
            for instruction in part.instructions:
                kind = instruction.opcode.removesuffix("-start")
                if kind in KINDS:
                    facts = _moved(instruction), part.times, part.exact
                    found.append(Collective(kind, *facts, instruction.source))
        return found

    def costs(self) -> list[Cost]:
        """Return what every kernel takes; what runs inside a fusion is part of it."""
        found = []
        for part in self._parts(self._entry):
            if not part.kernels:
                continue
            shapes = {i.name: i.shape for i in part.instructions}
            for instruction in part.instructions:
                if instruction.opcode not in _FREE:
                    cost = self._flops(instruction, shapes), _bytes(instruction, shapes)
                    said = _SAID.search(instruction.rest)
                    cost = (int(said.group(1)), int(said.group(2))) if said else cost
                    found.append(Cost(instruction.source, *cost, part.times, part.exact))
        return found

    def host_calls(self) -> list[str]:
        """Return what leaves the device in the middle of the program, by name."""
        names = []
        for instruction in self.instructions():
            target = _TARGET.search(instruction.rest)
            if target and "callback" in target.group(1).lower():
                names.append(target.group(1))
            if instruction.opcode in ("infeed", "outfeed"):
                names.append(instruction.opcode)
        return names

    def types(self) -> set[str]:
        """Return the element types of all results."""
        return {kind for i in self.instructions() for kind, _ in _ARRAY.findall(i.shape)}

    def _parts(
        self, name: str, times: int = 1, exact: bool = True, kernels: bool = True
    ) -> Iterator[_Part]:
        """Yield a computation and all that it runs, callers before callees."""
        instructions = self._computations.get(name, [])
        yield _Part(instructions, times, exact, kernels)
        for instruction in instructions:
            turns, sequence = self._turns(instruction), instruction.opcode in _SEQUENCES
            for callee in instruction.called:
                known = exact and turns is not None
                yield from self._parts(callee, times * (turns or 1), known, kernels and sequence)

    def _turns(self, instruction: Instruction) -> int | None:
        """How often an instruction's computations run; None where the data decide.

        Where XLA does not say it, the condition does: a loop that counts compares with its end.
        """
        condition = _CONDITION.search(instruction.rest)
        if instruction.turns is not None or condition is None:
            return instruction.turns
        lines = {i.name: i for i in self._computations.get(condition.group(1), [])}
        last = list(lines.values())[-1] if lines else None
        if last is None or last.opcode != "compare" or "direction=LT" not in last.rest:
            return None
        ends = [lines[name] for name in last.operands if name in lines]
        numbers = [_NUMBER.match(end.rest) for end in ends if end.opcode == "constant"]
        return int(numbers[0].group(1)) if len(numbers) == 1 and numbers[0] else None

    def _flops(self, instruction: Instruction, shapes: dict[str, str]) -> int:
        if instruction.opcode == "convolution":
            return _of_convolution(instruction, shapes)
        if instruction.opcode == "dot":
            return _of_dot(instruction, shapes)
        if instruction.opcode != "fusion":
            return 0
        total = 0
        for name in instruction.called:
            inner = self._computations.get(name, [])
            inside = {i.name: i.shape for i in inner}
            total += sum(self._flops(i, inside) for i in inner)
        return total


def nbytes(shape: str) -> int:
    """Return the size of a type such as `(f32[4,8]{1,0}, pred[])`, bytes."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _bits(kind) // 8
        for kind, dims in _ARRAY.findall(shape)
    )


def main_memory(shape: str) -> int:
    """Return the part of a type's size that lies in main memory, not in a core's own (`S(1)`)."""
    return sum(
        nbytes(array) for array in _WITH_LAYOUT.findall(shape) if not re.search(r"S\([1-9]", array)
    )


def _bytes(instruction: Instruction, shapes: dict[str, str]) -> int:
    arrays = [instruction.shape, *(shapes.get(operand, "") for operand in instruction.operands)]
    return sum(main_memory(array) for array in arrays)


def _of_convolution(instruction: Instruction, shapes: dict[str, str]) -> int:
    """Each output sums over the window and the input channels of its group.

    Zeros that a dilated input inserts are left out: products in batches are written that way too.
    """
    labels, window = _DIMS.search(instruction.rest), _WINDOW.search(instruction.rest)
    if labels is None:
        return 0
    kernel = _dims(shapes.get(instruction.operands[1], ""))
    channels = kernel[labels.group(2).index("i")] if kernel else 0
    sizes = dict(pair.split("=") for pair in window.group(1).split()) if window else {}
    taps = math.prod(_taps(sizes, _places(instruction, shapes, labels)))
    features = math.prod(_dims(instruction.shape)) // math.prod(
        out for _, out in _places(instruction, shapes, labels)
    )
    return 2 * features * taps * channels


def _places(
    instruction: Instruction, shapes: dict[str, str], labels: re.Match[str]
) -> list[tuple[int, int]]:
    """Input and output size along every spatial axis, in the order of the window."""
    given, made = _dims(shapes.get(instruction.operands[0], "")), _dims(instruction.shape)
    axes = sorted(letter for letter in labels.group(3) if letter.isdigit())
    return [(given[labels.group(1).index(a)], made[labels.group(3).index(a)]) for a in axes]


def _taps(sizes: dict[str, str], places: list[tuple[int, int]]) -> Iterator[int]:
    """Along every axis, how often an element of the window meets one of the input.

    What the window meets outside the input, or in the holes of a dilated one, is no operation:
    products in batches, and those of vectors, are written as convolutions that are mostly that.
    """
    count = len(places)

    def each(name: str, default: str) -> list[str]:
        return sizes[name].split("x") if name in sizes else [default] * count

    for i, (given, made) in enumerate(places):
        size, stride = int(each("size", "1")[i]), int(each("stride", "1")[i])
        hole, step = int(each("lhs_dilate", "1")[i]), int(each("rhs_dilate", "1")[i])
        before = int(each("pad", "0_0")[i].split("_")[0])
        reached = (given - 1) * hole
        total = 0
        for tap in range(size):
            first = max(0, -((tap * step - before) // stride))
            last = min(made - 1, (reached + before - tap * step) // stride)
            total += max(0, last - first + 1)
        yield total // hole


def _of_dot(instruction: Instruction, shapes: dict[str, str]) -> int:
    contracted = _CONTRACTED.search(instruction.rest)
    left = _dims(shapes.get(instruction.operands[0], ""))
    if contracted is None or not left:
        return 0
    axes = [int(axis) for axis in contracted.group(1).split(",") if axis]
    return 2 * math.prod(_dims(instruction.shape)) * math.prod(left[axis] for axis in axes)


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(n) for n in found.group(2).split(",") if n] if found else []


def _times(sizes: str) -> int:
    return math.prod(int(n) for n in sizes.split("x"))


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits.group()) if digits else 0


def _moved(instruction: Instruction) -> int:
    """Size of the result; the start of an asynchronous exchange also lists what goes in."""
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return nbytes(instruction.shape)
    arrays = _ARRAY.findall(instruction.shape)
    sizes = [nbytes(f"{kind}[{dims}]") for kind, dims in arrays if dims or kind not in ("u32",)]
    return max(sum(sizes) // 2, max(sizes, default=0))


def _parse(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if not named:
        return None
    name, text = named.groups()
    end = _end_of_type(text)
    opcode, _, rest = text[end:].strip().partition("(")
    return Instruction(name, text[:end], opcode.strip(), rest)


def _end_of_operands(rest: str) -> int:
    """Place of the parenthesis that closes the operands; the opening one is cut off already."""
    depth = 0
    for place, letter in enumerate(rest):
        if letter == "(":
            depth += 1
        elif letter == ")":
            if depth == 0:
                return place
            depth -= 1
    return len(rest)


def _end_of_type(text: str) -> int:
    """Place behind the type, which may be a tuple and holds no blank outside parentheses."""
    depth = 0
    for place, letter in enumerate(text):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == " " and depth == 0:
            return place
    return len(text)
