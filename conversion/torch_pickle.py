"""The pickle inside a torch checkpoint, understood without being executed.

A pickle is a program for a small stack machine. The machine here knows the few instructions that
a table of tensors needs and calls nothing by name: what the program asks for is looked up in a
closed list and answered with inert records of `torch_table`.

Source: the comments on every instruction in the standard library's pickletools.
"""

import struct
from collections.abc import Callable
from typing import Any

from sss_jax.conversion.tensors import Refused, shown
from sss_jax.conversion.torch_table import BUILDERS, STORAGES, Name, storage_of

MAX_PICKLE = 2**23
MAX_STEPS = 500_000
_PROTOCOLS = range(2, 6)
_KEY_TYPES = (str, int, float, bool, type(None))


def interpret(data: bytes) -> Any:
    """Value of a pickle made of tensors, numbers, texts, tuples, lists and dicts.

    Raises:
        Refused: it is damaged, too long, or asks for anything else. Nothing was executed.
    """
    if len(data) > MAX_PICKLE:
        raise Refused(f"its table has {len(data):,} bytes; at most {MAX_PICKLE:,} are read")
    tape, machine = _Tape(data), _Machine()
    if tape.take(1) != b"\x80" or tape.number("B") not in _PROTOCOLS:
        raise Refused("its table is no pickle of protocols 2 to 5")
    for _ in range(MAX_STEPS):
        code = tape.take(1)
        if code == b".":
            if not tape.is_at_end():
                raise Refused("its table goes on after its end")
            return machine.result()
        if code not in _INSTRUCTIONS:
            raise Refused(f"its table uses instruction {code!r}, which no table of tensors needs")
        read, act = _INSTRUCTIONS[code]
        act(machine, read(tape))
    raise Refused(f"its table takes more than {MAX_STEPS:,} steps")


class _Tape:
    """The program, read from front to back; nothing larger than what is there is made."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def is_at_end(self) -> bool:
        return self._position == len(self._data)

    def take(self, count: int) -> bytes:
        start, end = self._position, self._position + count
        if end > len(self._data):
            raise Refused("its table is cut short")
        self._position = end
        return self._data[start:end]

    def number(self, kind: str) -> Any:
        """A number in one of struct's formats, little-endian unless it says otherwise."""
        code = struct.Struct(kind if kind.startswith(">") else f"<{kind}")
        return code.unpack(self.take(code.size))[0]

    def text(self, kind: str) -> str:
        return _decode(self.take(self.number(kind)))

    def name(self) -> str:
        """Two lines, the module and what to find in it."""
        return f"{self._line()}.{self._line()}"

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position)
        if end < 0:
            raise Refused("its table is cut short")
        line = self.take(end - self._position)
        self.take(1)
        return _decode(line)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"its table holds the unreadable text {shown(raw)}") from None


class _Machine:
    """Stack, marks and memo; methods that take an argument are instructions."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """The one value that is left."""
        if len(self._stack) != 1 or self._marks:
            raise Refused("its table does not end with one value")
        return self._stack[0]

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refused("its table takes a value that it never made")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise Refused("its table closes what it never opened")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if not isinstance(value, kind):
            raise Refused(f"its table treats a {type(value).__name__} as a {kind.__name__}")
        self._stack.append(value)
        return value

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def remember(self, slot: int | None) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo[len(self._memo) if slot is None else slot] = value

    def recall(self, slot: int) -> None:
        if slot not in self._memo:
            raise Refused("its table recalls what it never remembered")
        self._stack.append(self._memo[slot])

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def tuple_to_mark(self, _: None) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def append(self, _: None) -> None:
        value = self._pop()
        self._top(list).append(value)

    def extend(self, _: None) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        _insert(self._top(dict), key, value)

    def set_items(self, _: None) -> None:
        values = self._pop_to_mark()
        if len(values) % 2:
            raise Refused("its table holds a name without a value")
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            _insert(target, key, value)

    def drop_attributes(self, _: None) -> None:
        self._pop()  # such as the versions of the layers, which torch hangs on the table
        self._top(dict)

    def name(self, name: str) -> None:
        self._stack.append(_allowed(name))

    def name_from_stack(self, _: None) -> None:
        attribute, module = self._pop(), self._pop()
        if type(attribute) is not str or type(module) is not str:
            raise Refused("its table asks for something that has no name")
        self._stack.append(_allowed(f"{module}.{attribute}"))

    def call(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        build = BUILDERS.get(function.name) if isinstance(function, Name) else None
        if build is None or type(arguments) is not tuple:
            raise Refused("its table calls something that is no tensor")
        self._stack.append(build(arguments))

    def storage(self, _: None) -> None:
        self._stack.append(storage_of(self._pop()))


def _insert(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Hashing nested tuples that share their parts can take forever, so they are no keys here.
    if type(key) not in _KEY_TYPES:
        raise Refused(f"its table has a {type(key).__name__} for a name")
    if key in target:
        raise Refused(f"its table holds {shown(key)} twice")
    target[key] = value


def _allowed(name: str) -> Name:
    if name not in STORAGES and name not in BUILDERS:
        raise Refused(
            f"its table asks for {shown(name)}, which is no tensor; nothing was executed. Where "
            "you trust the file, load it with torch and save the weights alone: "
            "torch.save({'model': model.state_dict()}, FILE)"
        )
    return Name(name)


_Instruction = tuple[Callable[[_Tape], Any], Callable[[_Machine, Any], None]]


def _fixed(value: Any) -> Callable[[_Tape], Any]:
    return lambda tape: value


def _number(kind: str) -> Callable[[_Tape], Any]:
    return lambda tape: tape.number(kind)


def _text(kind: str) -> Callable[[_Tape], Any]:
    return lambda tape: tape.text(kind)


def _bytes(kind: str) -> Callable[[_Tape], Any]:
    return lambda tape: tape.take(tape.number(kind))


def _long(tape: _Tape) -> int:
    return int.from_bytes(tape.take(tape.number("B")), "little", signed=True)


_NOTHING = _fixed(None)
_INSTRUCTIONS: dict[bytes, _Instruction] = {
    # Values.
    b"N": (_NOTHING, _Machine.push),
    b"\x88": (_fixed(True), _Machine.push),
    b"\x89": (_fixed(False), _Machine.push),
    b"J": (_number("i"), _Machine.push),
    b"K": (_number("B"), _Machine.push),
    b"M": (_number("H"), _Machine.push),
    b"\x8a": (_long, _Machine.push),
    b"G": (_number(">d"), _Machine.push),
    b"X": (_text("I"), _Machine.push),
    b"\x8c": (_text("B"), _Machine.push),
    b"\x8d": (_text("Q"), _Machine.push),
    b"B": (_bytes("I"), _Machine.push),
    b"C": (_bytes("B"), _Machine.push),
    # Containers; a new one each time.
    b")": (_fixed(()), _Machine.push),
    b"]": (lambda tape: [], _Machine.push),
    b"}": (lambda tape: {}, _Machine.push),
    b"\x85": (_fixed(1), _Machine.tuple_of),
    b"\x86": (_fixed(2), _Machine.tuple_of),
    b"\x87": (_fixed(3), _Machine.tuple_of),
    b"(": (_NOTHING, _Machine.mark),
    b"t": (_NOTHING, _Machine.tuple_to_mark),
    b"a": (_NOTHING, _Machine.append),
    b"e": (_NOTHING, _Machine.extend),
    b"s": (_NOTHING, _Machine.set_item),
    b"u": (_NOTHING, _Machine.set_items),
    # Memo.
    b"q": (_number("B"), _Machine.remember),
    b"r": (_number("I"), _Machine.remember),
    b"\x94": (_NOTHING, _Machine.remember),
    b"h": (_number("B"), _Machine.recall),
    b"j": (_number("I"), _Machine.recall),
    # Names, calls and storages.
    b"c": (_Tape.name, _Machine.name),
    b"\x93": (_NOTHING, _Machine.name_from_stack),
    b"R": (_NOTHING, _Machine.call),
    b"b": (_NOTHING, _Machine.drop_attributes),
    b"Q": (_NOTHING, _Machine.storage),
    b"\x95": (_number("Q"), lambda machine, size: None),  # a frame, only of use to streams
}
