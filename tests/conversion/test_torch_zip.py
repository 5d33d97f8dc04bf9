"""Torch's files without torch: what is sound is read exactly, what is not is refused unexecuted."""

import builtins
import contextlib
import io
import itertools
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sss_jax.conversion import torch_pickle, torch_table, torch_zip, zip_members
from sss_jax.conversion.tensors import Refused
from sss_jax.conversion.torch_zip import read_torch, write_torch
from sss_jax.errors import CheckpointError

SIX = np.arange(6, dtype=np.float32)


def read_all(path):
    with read_torch(path) as tensors:
        return dict(tensors)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == a.dtype
        and found[n].shape == a.shape
        and found[n].tobytes() == a.tobytes()
        for n, a in expected.items()
    )


@pytest.fixture
def save(tmp_path):
    """Write bytes to a file and return its path."""

    def write(content):
        path = tmp_path / "model.pt"
        path.write_bytes(content)
        return path

    return write


# Sound files.

EVERY_TYPE = {
    "f32": np.array([[1.5, -0.0], [np.nan, np.inf]], np.float32),
    "f64": np.array([np.pi, 5e-324]),
    "f16": np.array([1.5, -65504], np.float16),
    "bf16": np.array([1.5, -3e38], ml_dtypes.bfloat16),
    "i64": np.array([-(2**63), 2**63 - 1]),
    "i32": np.array([[[7]]], np.int32),
    "i16": np.array([-5], np.int16),
    "i8": np.array([-128, 127], np.int8),
    "u8": np.array([0, 255], np.uint8),
    "flags": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "ünïcode": np.float32([1]),
}


def test_what_is_written_is_read(tmp_path) -> None:
    path = tmp_path / "model.pt"
    write_torch(path, EVERY_TYPE)
    assert same(read_all(path), EVERY_TYPE)
    with read_torch(path) as tensors:
        assert list(tensors) == list(EVERY_TYPE)
        assert {n: tuple(s) for n, s in tensors.specs.items()} == {
            n: (a.shape, a.dtype) for n, a in EVERY_TYPE.items()
        }


def test_writing_is_reproducible_and_aligned(tmp_path) -> None:
    for name in ("a.pt", "b.pt"):
        write_torch(tmp_path / name, EVERY_TYPE)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]
    with (tmp_path / "a.pt").open("rb") as stream:
        members = zip_members.StoredZip(stream).members.values()
    assert {m.start % 64 for m in members} == {0}


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "expected"),
    [
        ((2, 3), (3, 1), 0, SIX.reshape(2, 3)),
        ((3, 2), (1, 3), 0, SIX.reshape(2, 3).T),
        ((2, 2), (3, 1), 1, SIX.reshape(2, 3)[:, 1:]),
        ((2,), (4,), 1, SIX[1::4]),
        ((), (), 5, np.array(5, np.float32)),
        ((6,), (1,), 0, SIX),
        ((1, 6, 1), (99, 1, 77), 0, SIX.reshape(1, 6, 1)),
        ((0, 5), (5, 1), 6, np.zeros((0, 5), np.float32)),
        ((0, 3), (1, 1), 6, np.zeros((0, 3), np.float32)),
        ((2, 2), (1, 1), 0, np.float32([[0, 1], [1, 2]])),
        ((3,), (0,), 4, np.float32([4, 4, 4])),
    ],
)
def test_views(save, checkpoint, one_tensor, shape, stride, offset, expected) -> None:
    path = save(checkpoint(one_tensor(shape=shape, stride=stride, offset=offset)))
    found = read_all(path)["w"]
    assert found.shape == shape
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


def test_big_endian_numbers(save, checkpoint, one_tensor) -> None:
    path = save(checkpoint(one_tensor(), {"0": SIX.astype(">f4")}, byteorder=b"big"))
    assert same(read_all(path), {"w": SIX.reshape(2, 3)})
    path = save(checkpoint(one_tensor(), byteorder=b"little"))
    assert same(read_all(path), {"w": SIX.reshape(2, 3)})


def wrapped(program, key):
    """{key: {"w": tensor}}, or the table itself where there is no key."""
    inner = program().raw(b"}(").text("w").tensor().raw(b"u").code[2:]
    outer = program().raw(b"}").text(key) if key else program()
    return outer.raw(inner + (b"s." if key else b".")).code


@pytest.mark.parametrize("key", ["", "model", "state_dict", "model_state_dict"])
def test_wrappers(save, checkpoint, program, key) -> None:
    assert same(read_all(save(checkpoint(wrapped(program, key)))), {"w": SIX.reshape(2, 3)})


@pytest.mark.parametrize("key", ["weights", "optimizer"])
def test_unknown_wrappers_are_refused(save, checkpoint, program, key) -> None:
    with pytest.raises(CheckpointError, match="holds 0 tables of tensors"):
        read_torch(save(checkpoint(wrapped(program, key))))


def test_numbers_are_no_names(save, checkpoint, program) -> None:
    code = program().raw(b"}").number(1).tensor().raw(b"s.").code
    with pytest.raises(CheckpointError, match="holds 0 tables of tensors"):
        read_torch(save(checkpoint(code)))


def test_two_tables_are_ambiguous(save, checkpoint, program) -> None:
    code = program().raw(b"}(")
    for key in ("model", "state_dict"):
        code.text(key).raw(b"}(").text("w").tensor().raw(b"u")
    with pytest.raises(CheckpointError, match="holds 2 tables of tensors"):
        read_torch(save(checkpoint(code.raw(b"u.").code)))


def test_prefix_of_parallel_training_is_taken_off(save, checkpoint, program) -> None:
    both = program().table(lambda p: p.text("module.a").tensor().text("module.b").tensor())
    assert set(read_all(save(checkpoint(both)))) == {"a", "b"}
    one = program().table(lambda p: p.text("module.a").tensor().text("b").tensor())
    assert set(read_all(save(checkpoint(one)))) == {"module.a", "b"}


def test_other_entries_are_not_read(save, checkpoint, program) -> None:
    """An optimiser's tensors lie in storages that are damaged; nobody notices."""
    code = program().raw(b"}(").text("model").raw(b"}(").text("w").tensor().raw(b"u")
    code.text("epoch").number(3).text("optimizer").raw(b"}").text("state")
    code.tensor(key="7", numel=999).raw(b"s").text("lr").raw(b"G" + struct.pack(">d", 0.1))
    code.text("betas").raw(b"](K\1N\x88\x89e").raw(b"u.")
    assert same(read_all(save(checkpoint(code.code))), {"w": SIX.reshape(2, 3)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(protocol) -> None:
    value = {"a": [1, 2.5, None, True, (3, 4, 5, 6), "é" * 300], "b": {1: -5, 2**40: "x"}, "c": ()}
    value["d"] = [value["a"], "x", ("y", "z"), (1,)]
    found = torch_pickle.interpret(pickle.dumps(value, protocol))
    assert found == value
    assert found["d"][0] is found["a"]


def test_attributes_of_a_table_are_dropped(save, checkpoint, program) -> None:
    """Torch puts the versions of its layers on the table as an attribute."""

    def build(p):
        return p.text("w").tensor()

    code = (
        program().table(build)[:-2] + program().raw(b"}").text("_metadata").raw(b"}sbs.").code[2:]
    )
    assert same(read_all(save(checkpoint(code))), {"w": SIX.reshape(2, 3)})


def test_parameters_are_tensors(save, checkpoint, program) -> None:
    def build(p):
        p.text("w").name("torch._utils._rebuild_parameter").raw(b"(").tensor()
        p.raw(b"\x88").name("collections.OrderedDict").raw(b")RtR")

    assert same(read_all(save(checkpoint(program().table(build)))), {"w": SIX.reshape(2, 3)})


# Hostile files.


class Canary:
    """Touches a file when it is unpickled the usual way."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        if self.how == "exec":
            return exec, (f"import pathlib; pathlib.Path({self.path!r}).touch()",)
        if self.how == "build":
            return Canary, (self.path, "built"), {"x": 1}
        return getattr(os, "system"), (f"touch {self.path}",)  # noqa: B009


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("how", ["system", "exec", "build"])
def test_nothing_in_a_pickle_is_executed(tmp_path, save, checkpoint, protocol, how) -> None:
    canary = tmp_path / "canary"
    table = pickle.dumps({"model": {"w": Canary(canary, how)}}, protocol)
    with pytest.raises(CheckpointError, match=r"model\.pt: its table"):
        read_torch(save(checkpoint(table)))
    with pytest.raises(CheckpointError, match="no torch checkpoint"):
        read_torch(save(table))
    assert not canary.exists()
    if how != "build":
        pickle.loads(table)  # the bait works
        assert canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch._utils._rebuild_tensor",
        "torch.FloatStorage.__class__",
        "torch.storage._load_from_bytes",
        "collections.OrderedDict.fromkeys",
        "numpy.core.multiarray._reconstruct",
        "sss_jax.conversion.torch_table._tensor",
    ],
)
def test_names_outside_the_list_are_refused(program, name) -> None:
    for code in (
        program().name(name).raw(b").R."),
        program().text(name.rpartition(".")[0]).text(name.rpartition(".")[2]).raw(b"\x93)R."),
    ):
        with pytest.raises(Refused, match=r"asks for .*nothing was executed.*torch.save"):
            torch_pickle.interpret(code.code)


def test_instructions_outside_the_list_are_refused() -> None:
    named = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
    allowed = {named[code] for code in torch_pickle._INSTRUCTIONS}
    assert allowed.isdisjoint(
        {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER"}
    )
    for code in set(named) - set(torch_pickle._INSTRUCTIONS) - {b"."}:
        with pytest.raises(Refused, match="uses instruction"):
            torch_pickle.interpret(b"\x80\2" + code + b"os\nsystem\n.")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (b"", "cut short"),
        (b"\x80\x02", "cut short"),
        (b"\x80\x02}", "cut short"),
        (b"\x80\1}.", "no pickle of protocols 2 to 5"),
        (b"\x80\6}.", "no pickle of protocols 2 to 5"),
        (b"}.", "no pickle of protocols 2 to 5"),
        (b"\x80\x02ccollections\nOrdered", "cut short"),
        (b"\x80\x02c\xff\nx\n.", "unreadable text"),
        (b"\x80\x02}.x", "goes on after its end"),
        (b"\x80\x02}}.", "does not end with one value"),
        (b"\x80\x02(.", "does not end with one value"),
        (b"\x80\x02}(.", "does not end with one value"),
        (b"\x80\x02R.", "takes a value that it never made"),
        (b"\x80\x02}Na.", "treats a dict as a list"),
        (b"\x80\x02]K\1K\2s.", "treats a list as a dict"),
        (b"\x80\x02]}b.", "treats a list as a dict"),
        (b"\x80\x02}(K\1u.", "a name without a value"),
        (b"\x80\x02}K\1K\2sK\1K\3s.", "holds '1' twice"),
        (b"\x80\x02})K\1s.", "has a tuple for a name"),
        (b"\x80\x02}]K\1s.", "has a list for a name"),
        (b"\x80\x02}u.", "closes what it never opened"),
        (b"\x80\x02(h\5.", "recalls what it never remembered"),
        (b"\x80\x02}(q\1.", "takes a value that it never made"),
        (b"\x80\x02K\1)R.", "calls something that is no tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls something that is no tensor"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something that is no tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "fills an ordered table"),
        (b"\x80\x02K\1Q.", "describes a storage in an unknown way"),
        (b"\x80\x02K\1X\1\0\0\0a\x93.", "has no name"),
        (b"\x80\x02X\1\0\0\0aK\1\x93.", "has no name"),
        (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "uses instruction b'L'"),
        (b"\x80\x02\x8a\xff" + b"\xff" * 20, "cut short"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "uses instruction"),
        (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "cut short"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "cut short"),
        (b"\x80\x02X\2\0\0\0\xff\xff.", "unreadable text"),
        (b"\x80\x02]\x80\x02.", "uses instruction"),
    ],
)
def test_broken_pickles_are_refused(code, problem) -> None:
    with pytest.raises(Refused, match=problem):
        torch_pickle.interpret(code)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"shape": (10**9,), "stride": (1,)}, "declares a tensor of 1,000,000,000 elements"),
        ({"shape": (10**9,), "stride": (0,)}, "declares a tensor of 1,000,000,000 elements"),
        ({"shape": (2**62, 2**62, 4), "stride": (1, 1, 1)}, "declares a tensor of"),
        ({"shape": (3, 3), "stride": (3, 1)}, "declares a tensor of 9 elements"),
        ({"offset": 1}, "from position 1 on in a storage of 6"),
        ({"offset": 10**15}, "from position 1,000,000,000,000,000 on"),
        ({"stride": (4, 1)}, "declares a tensor of 6 elements"),
        ({"stride": (2**62, 1)}, "declares a tensor of 6 elements"),
        ({"shape": (0,), "stride": (1,), "offset": 7}, "from position 7 on"),
        ({"offset": -1}, "without sizes"),
        ({"shape": (-2, -3)}, "without sizes"),
        ({"stride": (-3, 1)}, "without sizes"),
        ({"shape": (2**63,), "stride": (1,)}, "without sizes"),
        ({"stride": (3,)}, "with 2 axes"),
        ({"shape": (1,) * 9, "stride": (1,) * 9}, "with 9 axes"),
        ({"numel": 10**9}, "take 24 bytes, not 4,000,000,000"),
        ({"numel": 5, "shape": (5,), "stride": (1,)}, "take 24 bytes, not 20"),
        ({"kind": "torch.DoubleStorage"}, "take 24 bytes, not 48"),
        ({"kind": "torch.ComplexFloatStorage"}, "asks for 'torch.ComplexFloatStorage'"),
        ({"kind": "collections.OrderedDict"}, "storage in an unknown way"),
        ({"word": "module"}, "storage in an unknown way"),
        ({"numel": -6}, "storage in an unknown way"),
        ({"key": "1"}, "numbers of 'w' are missing"),
        ({"key": "../data.pkl"}, "numbers of 'w' are missing"),
    ],
)
def test_impossible_tensors_are_refused(save, checkpoint, one_tensor, fields, problem) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_torch(save(checkpoint(one_tensor(**fields))))


@pytest.mark.parametrize(
    ("function", "first", "rest", "problem"),
    [
        ("_rebuild_tensor_v2", "storage", b"K\0)", "tensor in an unknown way"),
        ("_rebuild_tensor_v2", "storage", b"K\0))\x89NNNN", "tensor in an unknown way"),
        ("_rebuild_tensor_v2", "number", b"K\0))\x89N", "tensor in an unknown way"),
        ("_rebuild_parameter", "tensor", b"\x89", "parameter in an unknown way"),
        ("_rebuild_parameter", "storage", b"\x89N", "parameter in an unknown way"),
        ("_rebuild_parameter", "number", b"\x89N", "parameter in an unknown way"),
    ],
)
def test_impossible_calls_are_refused(program, function, first, rest, problem) -> None:
    code = program().name(f"torch._utils.{function}").raw(b"(")
    code = code.number(5) if first == "number" else getattr(code, first)()
    with pytest.raises(Refused, match=problem):
        torch_pickle.interpret(code.raw(rest + b"tR.").code)


def test_storages_have_names(program) -> None:
    code = program().raw(b"(").text("storage").name("torch.FloatStorage").number(0)
    with pytest.raises(Refused, match="storage in an unknown way"):
        torch_pickle.interpret(code.text("cpu").number(6).raw(b"tQ.").code)


def test_a_tensor_that_spans_too_much_is_refused(save, checkpoint, one_tensor, monkeypatch) -> None:
    monkeypatch.setattr(torch_zip, "MAX_TENSOR_BYTES", 20)
    path = save(checkpoint(one_tensor(shape=(2,), stride=(5,))))
    with read_torch(path) as tensors, pytest.raises(CheckpointError, match="24 bytes; at most 20"):
        tensors["w"]


def test_entries_that_are_no_tensors_are_refused(save, checkpoint, program) -> None:
    code = program().table(lambda p: p.text("w").tensor().text("note").text("hello"))
    with pytest.raises(CheckpointError, match="none: 'note'"):
        read_torch(save(checkpoint(code)))


def hostile_archives(archive, one_tensor):
    """(name, bytes, expected message) of archives that are wrong as archives."""
    table, six = one_tensor(), SIX.tobytes()
    sound = {"archive/data.pkl": table, "archive/data/0": six, "archive/version": b"3\n"}
    good = archive(sound)
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    zeros = {**sound, "archive/data/0": bytes(10**6)}
    yield "empty", b"", "no torch checkpoint"
    yield "legacy", legacy, "before version 1.6"
    yield "tar", b"sys_info" + bytes(1000), "before version 1.6"
    yield "magic only", b"PK\3\4", "too short"
    yield "comment", archive(sound, comment=b"hello"), "does not end like a checkpoint"
    yield "trailing bytes", good + b"\0", "does not end like a checkpoint"
    yield "bytes in front", b"PK\3\4" + good, "not where it should be"
    yield "compressed", archive(zeros, zipfile.ZIP_DEFLATED), "is compressed"
    yield "bzip2", archive(zeros, zipfile.ZIP_BZIP2), "is compressed"
    yield "nested", archive({"inner.pt": good}), "holds 0 tables of tensors"
    yield "zip inside", archive({**sound, "archive/inner.zip": good}), "archive/inner.zip"
    yield "code inside", archive({**sound, "archive/code/m.py": b""}), "archive/code/m.py"
    yield "two tables", archive({**sound, "b/data.pkl": table}), "holds 2 tables of tensors"
    yield "deep root", archive({"a/b/data.pkl": table, "a/b/data/0": six}), "tables of tensors"
    yield "two roots", archive({**sound, "other/data/0": six}), "other/data/0"
    for name in ("../x", "archive/../x", "/etc/x", "archive//x", "a\\..\\x", "./x", "archive/"):
        yield f"name {name}", archive({**sound, name: six}), "unsafe name"
    yield "NUL in a name", good.replace(b"archive/version", b"archive/ver\0ion"), "unsafe name"
    yield "other byte order", archive({**sound, "archive/byteorder": b"middle"}), "byte order is"
    yield "long byte order", archive({**sound, "archive/byteorder": b"x" * 10**6}), "byte order is"
    yield "no members", archive({}), "no torch checkpoint"
    yield from patched_archives(good)
    yield "cut", good[:-30], "does not end like a checkpoint"


def patched_archives(good):
    """Archives whose records were changed by hand."""
    end = len(good) - 22
    directory = struct.unpack_from("<L", good, end + 16)[0]
    entry = good[directory : directory + 46 + 16]  # of archive/data.pkl
    assert entry.endswith(b"archive/data.pkl")

    def patch(position, code, *values):
        return (
            good[:position] + struct.pack(code, *values) + good[position + struct.calcsize(code) :]
        )

    def patch_both(local, central, code, *values):
        changed = patch(local, code, *values)
        data = struct.pack(code, *values)
        return changed[: directory + central] + data + changed[directory + central + len(data) :]

    second = struct.unpack_from("<L", good, directory + len(entry) + 42)[0]
    yield "encrypted", patch_both(6, 8, "<H", 1), "encrypted"
    yield "flags differ", patch(directory + 8, "<H", 0x800), "described in two ways"
    yield "method without a gain", patch_both(8, 10, "<H", 8), "is compressed"
    yield "member in another volume", patch(directory + 34, "<H", 1), "in another volume"
    yield "damaged entry", patch(directory, "<B", 0), "list of members is damaged"
    yield "long entry", patch(directory + 30, "<H", 65535), "list of members is damaged"
    yield "damaged second header", patch(second, "<B", 0), "described in two ways"
    yield "beyond the data", patch_both(18, 20, "<2L", 10**9, 10**9), "reaches beyond the data"
    yield "comment that is not there", patch(end + 20, "<H", 5), "does not end like"
    yield "disk", patch(end + 4, "<H", 1), "one volume of several"
    yield "disk of the list", patch(end + 6, "<H", 1), "one volume of several"
    yield "members elsewhere", patch(end + 8, "<H", 1), "one volume of several"
    yield "other sizes", patch(directory + 24, "<L", 10**9), "is compressed"
    yield "huge", patch(directory + 20, "<2L", 10**9, 10**9), "two sizes"
    yield "far header", patch(directory + 42, "<L", 2**32 - 2), "lies beyond the data"
    yield "no header", patch(directory + 42, "<L", 1), "described in two ways"
    yield "other name", patch(directory + 46, "<B", ord("b")), "described in two ways"
    yield "other method inside", patch(8, "<H", 8), "described in two ways"
    yield "other sizes inside", patch(18, "<2L", 9, 9), "two sizes"
    yield "other checksum", patch(directory + 16, "<L", 1), "do not match their checksum"
    yield "more members", patch(end + 8, "<2H", 9, 9), "is cut short"
    yield "fewer members", patch(end + 8, "<2H", 1, 1), "longer than it says"
    yield "a million members", patch(end + 8, "<2H", 65535, 65535), "too many"
    yield "far directory", patch(end + 16, "<L", 2**32 - 1), "not where it should be"
    yield "long directory", patch(end + 12, "<L", 2**32 - 1), "too many"
    count = struct.unpack_from("<H", good, end + 8)[0] + 1
    size = end - directory + len(entry)
    twice = good[:end] + entry + good[end : end + 8]
    twice += struct.pack("<2H2LH", count, count, size, directory, 0)
    yield "same member twice", twice, "holds 'archive/data.pkl' twice"
    other = entry.replace(b"data.pkl", b"data/222")
    overlap = good[:end] + other + good[end : end + 8]
    overlap += struct.pack("<2H2LH", count, count, size, directory, 0)
    yield "two names for the same bytes", overlap, "described in two ways"
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 5, 1)
    yield "far 64-bit end", good[:end] + locator + good[end:], "64-bit end record is not where"
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, 0, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    yield "2^40 members", good[:end] + end64 + locator + good[end:], "too many"
    for mark, here in ((b"PK\6\6", count), (b"PK\6\0", count - 1)):
        where = (here, count - 1, end - directory, directory)
        end64 = struct.pack("<4sQ2H2L4Q", mark, 44, 45, 45, 0, 0, *where)
        bad = good[:end] + end64 + locator + good[end:]
        yield f"bad 64-bit end {here}", bad, "record is damaged"


def test_hostile_archives_are_refused(save, archive, one_tensor) -> None:
    names = set()
    for name, content, problem in hostile_archives(archive, one_tensor):
        names.add(name)
        path = save(content)
        with pytest.raises(CheckpointError, match=f"model.pt: .*({problem})"):
            print(name, read_all(path))
    assert len(names) > 35


def test_members_that_share_bytes_are_refused(save) -> None:
    """A quoted archive: the second member lies inside the first."""
    inner = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(b"xy"), 2, 2, 8, 0)
    inner += b"a/data/1" + b"xy"
    outer = struct.pack(
        "<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(inner), len(inner), len(inner), 8, 0
    )
    data = outer + b"a/data/0" + inner
    entries = b""
    for name, body, header in ((b"a/data/0", inner, 0), (b"a/data/1", b"xy", 38)):
        sizes = (zlib.crc32(body), len(body), len(body), len(name))
        central = struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, *sizes, 0, 0, 0, 0, 0, header
        )
        entries += central + name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(entries), len(data), 0)
    with pytest.raises(CheckpointError, match="'a/data/1' overlaps another"):
        read_torch(save(data + entries + end))


def test_64_bit_records_are_understood(save, archive, one_tensor) -> None:
    """Torch always writes the 64-bit end record; a large member has its sizes in an extra field."""
    good = archive({"archive/data.pkl": one_tensor(), "archive/data/0": SIX.tobytes()})
    end = len(good) - 22
    count, length, directory = struct.unpack_from("<H2L", good, end + 10)
    entries = bytearray(good[directory:end])
    size, packed = struct.unpack_from("<2L", entries, 20)
    assert size == packed == len(one_tensor())
    struct.pack_into("<2L", entries, 20, 2**32 - 1, 2**32 - 1)
    extra = struct.pack("<2HL", 0x4650, 4, 0) + struct.pack("<2H2Q", 1, 16, size, size)
    struct.pack_into("<H", entries, 30, len(extra))
    name = 46 + len("archive/data.pkl")
    entries[name:name] = extra
    tail = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), directory
    )
    tail += struct.pack("<4sLQL", b"PK\6\7", 0, directory + len(entries), 1)
    tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    assert length < len(entries)
    path = save(good[:directory] + bytes(entries) + tail)
    assert same(read_all(path), {"w": SIX.reshape(2, 3)})


def test_sizes_may_follow_the_numbers(save, archive, one_tensor) -> None:
    """Torch leaves the sizes in a member's own header at 0 and says so by a flag."""
    content = bytearray(archive({"a/data.pkl": one_tensor(), "a/data/0": SIX.tobytes()}))
    directory = struct.unpack_from("<L", content, len(content) - 6)[0]
    for position in range(len(content)):
        mark = content[position : position + 4]
        if mark == b"PK\3\4":
            struct.pack_into("<H", content, position + 6, 8)
            struct.pack_into("<3L", content, position + 14, 0, 0, 0)
        elif mark == b"PK\1\2":
            assert position >= directory
            struct.pack_into("<H", content, position + 8, 8)
    assert same(read_all(save(bytes(content))), {"w": SIX.reshape(2, 3)})


def test_archives_without_members_or_bytes() -> None:
    assert zip_members.StoredZip(io.BytesIO(b"PK\5\6" + bytes(18))).members == {}
    with pytest.raises(Refused, match="too short"):
        zip_members.StoredZip(io.BytesIO(b"PK\5\6" + bytes(17)))


def test_nothing_outside_a_member_is_read(archive) -> None:
    members = zip_members.StoredZip(io.BytesIO(archive({"a": b"123456"})))
    assert members.read("a", 2, 3) == b"345"
    for start, length in ((0, 7), (6, 1), (7, 0), (-1, 2), (3, -1)):
        with pytest.raises(Refused, match="ends before"):
            members.read("a", start, length)


def test_a_file_that_shrinks_is_noticed(save, checkpoint, one_tensor) -> None:
    numbers = np.arange(10**5, dtype=np.float32)  # more than a buffer holds
    content = checkpoint(one_tensor(shape=(10**5,), stride=(1,), numel=10**5), {"0": numbers})
    path = save(content)
    with read_torch(path) as tensors:
        os.truncate(path, len(content) // 2)
        with pytest.raises(CheckpointError, match="cut short"):
            tensors["w"]


def test_damaged_numbers_are_noticed_when_they_are_read(save, checkpoint, one_tensor) -> None:
    content = bytearray(checkpoint(one_tensor()))
    content[content.index(SIX.tobytes()) + 5] ^= 1
    path = save(bytes(content))
    with read_torch(path) as tensors, pytest.raises(CheckpointError, match="checksum"):
        tensors["w"]
    part = checkpoint(one_tensor(shape=(2,), stride=(1,), offset=4))
    content = bytearray(part)
    content[content.index(SIX.tobytes()) + 5] ^= 1  # outside the part that is used
    with read_torch(save(bytes(content))) as tensors, pytest.raises(CheckpointError):
        tensors["w"]


def test_files_that_are_none_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch(tmp_path / "pipe")


def test_limits_of_the_pickle() -> None:
    with pytest.raises(Refused, match="at most 8,388,608"):
        torch_pickle.interpret(b"\x80\x02" + b"N" * 2**23 + b".")


# Memory. The files are small; what they declare is not. A process of its own tells its peak.

_BOMBS = {
    "empty dicts": b"\x80\x02(" + b"}" * (torch_pickle.MAX_STEPS + 10) + b"t.",
    "remembered dicts": b"\x80\x02(" + b"}\x94" * torch_pickle.MAX_STEPS + b"t.",
    "shared tuples": b"\x80\x02)" + b"".join(b"q\0h\0\x86" for _ in range(100)) + b".",
    "tuple as a name": b"\x80\x02})" + b"".join(b"q\0h\0\x86" for _ in range(100)) + b"Ns.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 400_000 + b".",
    "long text": b"\x80\x02X" + struct.pack("<I", 2**31) + b"x" * 1000 + b".",
    "long bytes": b"\x80\x02B" + struct.pack("<I", 2**32 - 1) + b".",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\1.",
    "far memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "marks": b"\x80\x02" + b"(" * 400_000 + b".",
}

_MEASURE = """
import resource, sys
from pathlib import Path
from sss_jax.conversion.torch_zip import read_torch
from sss_jax.errors import CheckpointError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
start = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with read_torch(path) as tensors:
            for name in tensors:
                tensors[name]
        sys.exit(f"{path.name} was accepted")
    except CheckpointError:
        pass
print(peak() - start)
"""


def test_hostile_files_take_little_memory(tmp_path, archive, checkpoint, one_tensor) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    contents = {name: content for name, content, _ in hostile_archives(archive, one_tensor)}
    contents |= {name: checkpoint(code) for name, code in _BOMBS.items()}
    contents["billion"] = checkpoint(one_tensor(shape=(10**9,), stride=(0,)))
    contents["storage"] = checkpoint(one_tensor(numel=10**10))
    for i, content in enumerate(contents.values()):
        (folder / str(i)).write_bytes(content)
    with (folder / "sparse").open("wb") as stream:
        stream.write(b"PK\3\4")
        stream.truncate(2**34)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 2**25
    command = [sys.executable, "-c", _MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, f"{done.stdout} MB more at the peak"


# Fuzz: whatever the bytes, an error of ours or the truth.

BASE = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.float16([1, 2])}


@st.composite
def mutations(draw, size):
    """Edits of a byte string: overwritten, removed, repeated and inserted pieces, and cuts."""
    place = st.integers(0, size)
    piece = st.binary(min_size=1, max_size=8)
    return draw(
        st.lists(st.tuples(st.sampled_from("ordixc"), place, place, piece), min_size=1, max_size=4)
    )


def mutate(content, edits):
    for kind, a, b, piece in edits:
        low, high = sorted((a, b))
        if kind == "o":
            content = content[:a] + piece + content[a + len(piece) :]
        elif kind == "d":
            content = content[:low] + content[min(high, low + 64) :]
        elif kind == "r":
            content = content[:high] + content[low:high] + content[high:]
        elif kind == "i":
            content = content[:a] + piece + content[a:]
        elif kind == "x":
            bit = bytes([content[a] ^ piece[0]]) if a < len(content) else b""
            content = content[:a] + bit + content[a + 1 :]
        else:
            content = content[:a]
    return content


QUIET = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUIET
@given(st.data())
def test_fuzzed_files_are_refused_or_right(tmp_path, data) -> None:
    path = tmp_path / "base.pt"
    if not path.exists():
        write_torch(path, BASE)
    sound = path.read_bytes()
    path.with_name("fuzzed.pt").write_bytes(mutate(sound, data.draw(mutations(len(sound)))))
    try:
        found = read_all(path.with_name("fuzzed.pt"))
    except CheckpointError:
        return
    assert same(found, BASE)


def plain(value):
    """Whether a value consists of inert parts only."""
    if isinstance(value, dict):
        return all(plain(v) for v in itertools.chain(value, value.values()))
    if type(value) in (list, tuple):
        return all(map(plain, value))
    records = (torch_table.TensorRef, torch_table.StorageRef, torch_table.Name)
    return type(value) in (str, bytes, int, float, bool, type(None), *records)


@QUIET
@given(st.data())
def test_fuzzed_pickles_are_refused_or_inert(monkeypatch, data) -> None:
    def forbidden(*_):
        raise AssertionError("a module was imported")

    specs = {name: torch_zip.Spec(a.shape, a.dtype) for name, a in BASE.items()}
    code = mutate(torch_table.compose(specs), data.draw(mutations(300)))
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", forbidden)
        try:
            value = torch_pickle.interpret(code)
        except Refused:
            return
    assert plain(value)


@QUIET
@given(st.binary(max_size=40))
def test_random_pickles_are_refused_or_inert(code) -> None:
    with contextlib.suppress(Refused):
        assert plain(torch_pickle.interpret(b"\x80\x02" + code + b"."))


def test_disk_errors_name_the_target(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"absent/model.pt: cannot be written \(No such file"):
        write_torch(tmp_path / "absent" / "model.pt", BASE)
    assert list(tmp_path.iterdir()) == []


def test_streams_are_closed_after_errors(save, archive) -> None:
    """A file that stays open would warn, and warnings are errors here."""
    path: Path = save(archive({"x": b""}))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            read_torch(path)
