"""The text of a compiled module, line by line: instructions, types, sizes.

Everything here is what one line says; `hlo.py` puts lines together to a program.
"""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0}

_NAME = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_WITH_LAYOUT = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")
_TILES = re.compile(r"\{([\d,]+):T\(([\d,]+)\)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NUMBER = re.compile(r"(\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=(?:\{(\{[\d,{}]+\})\}|\[([\d,]+)\]<=)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


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

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of what goes in."""
        return _OPERAND.findall(self.rest[: _end_of_operands(self.rest)])

    @property
    def number(self) -> int | None:
        """What alone stands in the parentheses: a parameter's place, a constant's value."""
        found = _NUMBER.match(self.rest)
        return int(found.group(1)) if found else None

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        groups = _CALLED.findall(self.rest)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]

    @property
    def group(self) -> int | None:
        """How many devices exchange with each other; None where the line does not say."""
        found = _GROUPS.search(self.rest)
        if not found:
            return None
        listed, shape = found.groups()
        if shape:  # so many groups, each of so many
            return int(shape.rpartition(",")[2])
        return max(one.count(",") + 1 for one in listed.strip("{}").split("},{"))

    @property
    def turns(self) -> int | None:
        """How often a loop runs, where that is known; 1 for everything else."""
        if self.opcode != "while":
            return 1
        found = _TURNS.search(self.rest)
        return int(found.group(1)) if found else None


def arrays_of(shape: str) -> list[tuple[str, str]]:
    """Return element type and dimensions of every array of a type."""
    return _ARRAY.findall(shape)


def nbytes(shape: str) -> int:
    """Return the size of a type such as `(f32[4,8]{1,0}, pred[])`, bytes."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _bits(kind) // 8
        for kind, dims in _ARRAY.findall(shape)
    )


def main_memory(shape: str) -> int:
    """Return what a type takes of main memory, without what lies in a core's own (`S(1)`).

    TPUs keep whole tiles: 96 channels in tiles of 128 take the room, and the time, of 128.
    """
    arrays = _WITH_LAYOUT.findall(shape)
    return sum(_in_tiles(array) for array in arrays if not re.search(r"S\([1-9]", array))


def _in_tiles(array: str) -> int:
    """Size of one array whose text has its layout, such as `bf16[8,96]{1,0:T(8,128)(2,1)}`."""
    tiled = _TILES.search(array)
    if not tiled:
        return nbytes(array)
    kind, dims = arrays_of(array)[0]
    sizes = [int(n) for n in dims.split(",")]
    order, tile = ([int(n) for n in part.split(",")] for part in tiled.groups())
    # The layout names axes from the fastest to the slowest, the tile from the slowest.
    for axis, side in zip(order, reversed(tile), strict=False):
        sizes[axis] = -(-sizes[axis] // side) * side
    return math.prod(sizes) * _bits(kind) // 8


def dims_of(shape: str) -> list[int]:
    """Return the dimensions of a type's first array."""
    found = _ARRAY.search(shape)
    return [int(n) for n in found.group(2).split(",") if n] if found else []


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits.group()) if digits else 0


def parse(line: str) -> Instruction | None:
    """Read a line; None where it is no instruction."""
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
