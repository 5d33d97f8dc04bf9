"""Safetensors: what is sound is read exactly, everything else is refused within bounds."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sss_jax.conversion import safetensors_file
from sss_jax.conversion.safetensors_file import read_safetensors, write_safetensors
from sss_jax.errors import CheckpointError

EVERY_TYPE = {
    "f64": np.array([np.pi, 5e-324]),
    "f32": np.array([[1.5, -0.0], [np.nan, np.inf]], np.float32),
    "f16": np.array([1.5, -65504], np.float16),
    "bf16": np.array([[1.5], [-3e38]], ml_dtypes.bfloat16),
    "i64": np.array([-(2**63), 2**63 - 1]),
    "i32": np.array(7, np.int32),
    "i16": np.array([-5], np.int16),
    "i8": np.array([-128], np.int8),
    "u64": np.array([2**64 - 1], np.uint64),
    "u32": np.array([1], np.uint32),
    "u16": np.array([1], np.uint16),
    "u8": np.array([255], np.uint8),
    "flags": np.array([True, False]),
    "empty": np.zeros((2, 0, 3), np.float32),
    "ünïcode/path": np.float32([1]),
}


def read_all(path):
    with read_safetensors(path) as tensors:
        return dict(tensors)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == a.dtype
        and found[n].shape == a.shape
        and found[n].tobytes() == a.tobytes()
        for n, a in expected.items()
    )


@pytest.mark.parametrize("about", [None, {}, {"format": "pt", "name": "é"}])
def test_what_is_written_is_read(tmp_path, about) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, EVERY_TYPE, about)
    assert same(read_all(path), EVERY_TYPE)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_written_files_follow_the_format(tmp_path) -> None:
    """Byte for byte: header length, header padded to eight bytes, numbers, widest type first."""
    path = tmp_path / "x.safetensors"
    a, b = np.float16([3]), np.array([[1, 2]], np.float32)
    write_safetensors(path, {"a": a, "b": b.T}, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + b.tobytes() + a.tobytes()
    assert path.read_bytes() == expected


def test_order_of_the_arrays_does_not_matter(tmp_path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write_safetensors(first, EVERY_TYPE)
    write_safetensors(second, dict(reversed(EVERY_TYPE.items())))
    assert first.read_bytes() == second.read_bytes()


def raw(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(dtype="F32", shape=(2,), place=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def test_hand_made_file_is_read(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw({"a": row()}, np.float32([1, 2]).tobytes()))
    assert same(read_all(path), {"a": np.float32([1, 2])})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no safetensors file"),
        (b"1234567", "no safetensors file"),
        (b"\1\0\0", "header is cut short"),
        (raw({}, b"", 0), "no safetensors file"),
        (raw({"a": row()}, length=2**21 + 1), "a header of 2,097,153 bytes"),
        (raw({"a": row()}, length=2**64 - 1), "no safetensors file"),
        (raw({"a": row()}, length=2000), "header is cut short"),
        (raw(b"{"), "no JSON"),
        (raw(b'{"a": \xff}'), "no JSON"),
        (raw(b"[" * 100_000), "no JSON"),
        (raw(b'{"a":' * 100_000), "no JSON"),
        (raw(b"[]"), "is no table"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
        (raw(b'{"a": 1, "a": 2}'), "holds twice: 'a'"),
        (raw(b'{"a": {"shape": [2], "shape": [3]}}'), "holds twice: 'shape'"),
        (raw({"a": 5}), "no description"),
        (raw({"a": {**row(), "more": 1}}), "no description"),
        (raw({"a": {"dtype": "F32", "shape": [2]}}), "no description"),
        (raw({"a": row("F8_E4M3")}), "unknown type"),
        (raw({"a": {**row(), "dtype": ["F32"]}}), "unknown type"),
        (raw({"a": row(shape=(-2, -1))}), "no proper shape"),
        (raw({"a": row(shape=(2.0,))}), "no proper shape"),
        (raw({"a": row(shape=(True, 2))}), "no proper shape"),
        (raw({"a": row(shape=("2",))}), "no proper shape"),
        (raw({"a": {**row(), "shape": 2}}), "no proper shape"),
        (raw({"a": row(shape=(1,) * 8 + (2,))}), "no proper shape"),
        (raw({"a": row(shape=(2**63,))}), "no proper shape"),
        (raw({"a": row(place=(0, 8.0))}), "no proper shape"),
        (raw({"a": row(place=(-8, 0))}), "no proper shape"),
        (raw({"a": row(place=(0, 8, 8))}), "another length"),
        (raw({"a": row(place=())}), "another length"),
        (raw({"a": row(place=(0, 4))}), "declares 8 bytes"),
        (raw({"a": row(place=(8, 0))}), "declares 8 bytes"),
        (raw({"a": row(shape=(10**9,))}), "declares 4,000,000,000 bytes"),
        (raw({"a": row(shape=(2**62, 2**62))}), "another length"),
        (raw({"a": row(shape=(10**9,), place=(0, 4 * 10**9))}), "holds 8 bytes of numbers"),
        (raw({"a": row(place=(8, 16))}, bytes(16)), "leave a gap at byte 0"),
        (raw({"a": row(), "b": row(place=(4, 12))}, bytes(12)), "overlap or leave a gap"),
        (raw({"a": row(), "b": row()}), "overlap or leave a gap"),
        (raw({"a": row(), "b": row(place=(12, 20))}, bytes(20)), "leave a gap at byte 8"),
        (raw({"a": row()}, bytes(9)), "holds 9 bytes of numbers, its header describes 8"),
        (raw({"a": row()}, bytes(7)), "holds 7 bytes of numbers"),
        (raw({}), "holds 8 bytes of numbers"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path, content, problem) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.safetensors: .*{problem}"):
        read_safetensors(path)


def test_many_repeated_names_are_refused_quickly(tmp_path) -> None:
    names = ",".join(f'"{i}":0' for i in range(100_000))
    path = tmp_path / "x"
    path.write_bytes(raw(b"{" + names.encode() + b',"7":0}'))
    with pytest.raises(CheckpointError, match="holds twice: '7'"):
        read_safetensors(path)


def test_large_tensors_are_refused_when_they_are_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw({"a": row()}))
    monkeypatch.setattr(safetensors_file, "MAX_TENSOR_BYTES", 7)
    with read_safetensors(path) as tensors, pytest.raises(CheckpointError, match="at most 7"):
        tensors["a"]


def test_a_file_that_shrinks_is_noticed(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw({"a": row("U8", (10**5,), (0, 10**5))}, bytes(10**5)))
    with read_safetensors(path) as tensors:
        os.truncate(path, 5 * 10**4)
        with pytest.raises(CheckpointError, match="cut short"):
            tensors["a"]


def test_files_that_are_none_are_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no such file"):
            read_safetensors(path)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_fuzzed_files_are_refused_or_consistent(tmp_path, data) -> None:
    """The format has no checksum: changed numbers are read, but never ones from elsewhere."""
    sound = raw({"a": row(), "b": row("U8", (3,), (8, 11))}, bytes(range(11)))
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    del content[data.draw(st.integers(1, 3 * len(content))) :]
    path = tmp_path / "x"
    path.write_bytes(content)
    try:
        with read_safetensors(path) as tensors:
            found = dict(tensors)
            assert {n: (a.shape, a.dtype) for n, a in found.items()} == tensors.specs
    except CheckpointError:
        return
    assert b"".join(array.tobytes() for array in found.values()) == bytes(content[-11:])
