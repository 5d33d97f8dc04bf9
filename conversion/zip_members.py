"""Members of a zip archive that are stored as they are, read within fixed bounds.

Source: PKWARE's APPNOTE 6.3. Only what checkpoints use is understood: no compression, no
encryption, no comments, no volumes. Whatever two readers could understand differently is refused.
"""

import struct
import zlib
from typing import BinaryIO, NamedTuple

from sss_jax.conversion.tensors import Refused, read_at, shown

MAX_MEMBERS = 50_000
MAX_DIRECTORY = 2**23
_CHUNK = 2**20

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_UNKNOWN16, _UNKNOWN32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8


class Member(NamedTuple):
    """One file of the archive.

    Attributes:
        name: path inside the archive.
        header: position of its own header.
        start: position of its first byte.
        size: bytes.
        crc32: checksum of them.
    """

    name: str
    header: int
    start: int
    size: int
    crc32: int


class StoredZip:
    """An archive that is open for reading.

    Args:
        stream: file of the archive; stays the caller's to close.

    Raises:
        Refused: it is damaged, or uses what checkpoints do not.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._verified: set[str] = set()
        offset, length, count = _find_directory(stream)
        data = read_at(stream, offset, length)
        self.members = _parse_directory(stream, data, count, offset)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read a part of a member, after checking the whole of it against its checksum."""
        member = self.members[name]
        length = member.size - start if length is None else length
        if not 0 <= start <= start + length <= member.size:
            raise Refused(f"its member {shown(name)} ends before the bytes it should hold")
        data = read_at(self._stream, member.start + start, length)
        if length == member.size:
            _compare(member, zlib.crc32(data))
        elif name not in self._verified:
            _compare(member, _checksum(self._stream, member))
            self._verified.add(name)
        return data


def _compare(member: Member, crc32: int) -> None:
    if crc32 != member.crc32:
        raise Refused(
            f"the bytes of its member {shown(member.name)} do not match their checksum; "
            "copy or download the file again"
        )


def _checksum(stream: BinaryIO, member: Member) -> int:
    crc32, position, end = 0, member.start, member.start + member.size
    while position < end:
        block = read_at(stream, position, min(_CHUNK, end - position))
        crc32 = zlib.crc32(block, crc32)
        position += len(block)
    return crc32


def _find_directory(stream: BinaryIO) -> tuple[int, int, int]:
    """Position, length and number of entries of the list of members."""
    end = stream.seek(0, 2) - _END.size
    if end < 0:
        raise Refused("it is too short for a zip archive")
    mark, disk, start_disk, here, count, length, offset, comment = _END.unpack(
        read_at(stream, end, _END.size)
    )
    if mark != b"PK\5\6" or comment:
        raise Refused("it does not end like a checkpoint; copy or download it again")
    if disk or start_disk or here != count:
        raise Refused("it is one volume of several")
    if (large := _find_directory64(stream, end)) is not None:
        end, offset, length, count = large
    if count > MAX_MEMBERS or length > MAX_DIRECTORY:
        raise Refused(f"it lists {count:,} members in {length:,} bytes, too many for a checkpoint")
    if offset + length != end:
        raise Refused("its list of members is not where it should be")
    return offset, length, count


def _find_directory64(stream: BinaryIO, end: int) -> tuple[int, int, int, int] | None:
    """Position of the 64-bit end record, and what it says of the list; None without one."""
    locator = end - _LOCATOR64.size
    if locator < 0:
        return None
    mark, _, position, _ = _LOCATOR64.unpack(read_at(stream, locator, _LOCATOR64.size))
    if mark != b"PK\6\7":
        return None
    if position != locator - _END64.size:
        raise Refused("its 64-bit end record is not where it should be")
    mark, _, _, _, _, _, here, count, length, offset = _END64.unpack(
        read_at(stream, position, _END64.size)
    )
    if mark != b"PK\6\6" or here != count:
        raise Refused("its 64-bit end record is damaged")
    return position, offset, length, count


def _parse_directory(stream: BinaryIO, data: bytes, count: int, limit: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        member, position = _parse_entry(stream, data, position, limit)
        if member.name in members:
            raise Refused(f"it holds {shown(member.name)} twice")
        members[member.name] = member
    if position != len(data):
        raise Refused("its list of members is longer than it says")
    _check_overlap(members)
    return members


def _parse_entry(stream: BinaryIO, data: bytes, position: int, limit: int) -> tuple[Member, int]:
    """Member at a position of the list, and the position of the next."""
    body = position + _CENTRAL.size
    if body > len(data):
        raise Refused("its list of members is cut short")
    fields = _CENTRAL.unpack_from(data, position)
    mark, flags, method, crc32 = fields[0], fields[3], fields[4], fields[7]
    packed, size, name_size, extra_size, comment_size = fields[8:13]
    disk, header = fields[13], fields[16]
    following = body + name_size + extra_size + comment_size
    if mark != b"PK\1\2" or following > len(data):
        raise Refused("its list of members is damaged")
    name = _decode(data[body : body + name_size])
    extra = data[body + name_size : body + name_size + extra_size]
    size, packed, header = _widen(extra, (size, packed, header))
    if method or packed != size:
        raise Refused(f"its member {shown(name)} is compressed; checkpoints are stored as they are")
    if flags & _ENCRYPTED or disk not in (0, _UNKNOWN16):
        raise Refused(f"its member {shown(name)} is encrypted or lies in another volume")
    start = _data_start(stream, header, name, (flags, size), limit)
    if start + size > limit:
        raise Refused(f"its member {shown(name)} reaches beyond the data")
    return Member(name, header, start, size, crc32), following


def _widen(extra: bytes, values: tuple[int, int, int]) -> list[int]:
    """Replace the values that do not fit into 32 bits by those of the 64-bit extra field."""
    field = _extra_field(extra, 1)
    wide = list(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    return [wide.pop(0) if value == _UNKNOWN32 and wide else value for value in values]


def _extra_field(extra: bytes, wanted: int) -> bytes:
    """Content of the first extra field of a kind; empty where there is none."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == wanted:
            return extra[position : position + length]
        position += length
    return b""


def _decode(raw: bytes) -> str:
    """Name of a member; one that could lead out of a folder is refused although none is made."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"a member has no readable name: {shown(raw)}") from None
    unsafe = {"", ".", ".."} & set(name.split("/"))
    if unsafe or "\\" in name or "\0" in name:
        raise Refused(f"its member {shown(name)} has an unsafe name")
    return name


def _data_start(
    stream: BinaryIO, header: int, name: str, expected: tuple[int, int], limit: int
) -> int:
    """Position of a member's bytes, from its own header, which must agree with the list."""
    flags, size = expected
    if header + _LOCAL.size > limit:
        raise Refused(f"its member {shown(name)} lies beyond the data")
    mark, _, own_flags, method, _, _, _, packed, own_size, name_size, extra_size = _LOCAL.unpack(
        read_at(stream, header, _LOCAL.size)
    )
    own_name = read_at(stream, header + _LOCAL.size, name_size)
    if mark != b"PK\3\4" or method or own_flags != flags or own_name != name.encode():
        raise Refused(f"its member {shown(name)} is described in two ways")
    known = not flags & _SIZES_FOLLOW and _UNKNOWN32 not in (packed, own_size)
    if known and (packed, own_size) != (size, size):
        raise Refused(f"its member {shown(name)} has two sizes")
    return header + _LOCAL.size + name_size + extra_size


def _check_overlap(members: dict[str, Member]) -> None:
    """Refuse members that share bytes: a small file could otherwise declare a huge content."""
    end = 0
    for member in sorted(members.values(), key=lambda m: m.header):
        if member.header < end:
            raise Refused(f"its member {shown(member.name)} overlaps another")
        end = member.start + member.size
