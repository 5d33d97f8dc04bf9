"""What a compiled program does between devices, read from the text of its HLO.

XLA decides which collectives a partitioned program needs, so they are counted where they are
final: in the optimised module. A loop's body stands in the text once and runs many times; where
XLA knows how often, its collectives are counted that often.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

from sss_jax import hlo_kernels
from sss_jax.hlo_text import Instruction, arrays_of, nbytes, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
# Results that are names for memory, not traffic.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
# Calls that set memory aside, or hand over what was started before.
_SETS_ASIDE = {"AllocateBuffer", "PrepareAsyncCallStart", "PrepareAsyncCallDone"}
# Runs computations whose instructions are kernels by themselves.
_SEQUENCES = {"while", "conditional", "call"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


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
            elif instruction := parse(line):
                current.append(instruction)
        if not self._entry:
            raise ValueError("this text has no ENTRY computation: it is no HLO module")

    def instructions(self) -> Iterator[Instruction]:
        """Yield every instruction of the text once."""
        for computation in self._computations.values():
            yield from computation

    def collectives(self) -> list[Collective]:
        """Return every exchange between devices; a device alone in its group exchanges nothing."""
        found = []
        for part in self._parts(self._entry):
            for instruction in part.instructions:
                kind = instruction.opcode.removesuffix("-start")
                if kind in KINDS and instruction.group != 1:
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
                if not _is_free(instruction):
                    cost = hlo_kernels.cost(instruction, shapes, self._computations)
                    found.append(Cost(instruction.source, *cost, part.times, part.exact))
        return found

    def products(self) -> dict[tuple[str, str], int]:
        """Return operations of products and convolutions by types of operands and precision.

        A kernel of our own counts under its first two operands that are matrices, at the default
        precision.
        """
        found: dict[tuple[str, str], int] = collections.defaultdict(int)
        for part in self._parts(self._entry):
            shapes = {i.name: i.shape for i in part.instructions}
            for instruction in part.instructions:
                if instruction.opcode == "fusion":  # what it runs is a part by itself
                    continue
                if flops := hlo_kernels.flops(instruction, shapes, self._computations):
                    found[hlo_kernels.precision(instruction, shapes)] += flops * part.times
        return dict(found)

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
        return {kind for i in self.instructions() for kind, _ in arrays_of(i.shape)}

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
        numbers = [end.number for end in ends if end.opcode == "constant"]
        return numbers[0] if len(numbers) == 1 else None


def _is_free(instruction: Instruction) -> bool:
    """Whether an instruction moves and computes nothing; the end of a transfer does not either."""
    target = _TARGET.search(instruction.rest) if instruction.opcode == "custom-call" else None
    aside = target is not None and target.group(1) in _SETS_ASIDE
    return aside or instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def _moved(instruction: Instruction) -> int:
    """Size of the result; the start of an asynchronous exchange also lists what goes in."""
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return nbytes(instruction.shape)
    arrays = arrays_of(instruction.shape)
    sizes = [nbytes(f"{kind}[{dims}]") for kind, dims in arrays if dims or kind not in ("u32",)]
    return max(sum(sizes) // 2, max(sizes, default=0))
