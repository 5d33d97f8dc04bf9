"""Small checkpoints of the official layout, and tools to build broken ones by hand."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from sss_jax.conversion import official, recognise
from sss_jax.conversion.official import Model
from sss_jax.models.presets import Sam2Config

MICRO = {
    "embed_dim": 8,
    "depths": (1, 1, 2, 1),
    "windows": (2, 2, 2, 2),
    "global_blocks": (3,),
    "pos_table": 3,
    "width": 32,
    "decoder_mlp": 16,
    "upscale_channels": (16, 8),
    "head_hidden": 16,
    "memory_width": 16,
    "memory_layers": 1,
    "memory_mlp": 16,
    "num_maskmem": 3,
}


@pytest.fixture
def micro(monkeypatch):
    """Stands a network of the official layout, but of a megabyte, in for the published ones."""

    def config(model):
        return Sam2Config(name=model.variant, version=model.version, **MICRO)

    published = [Model("micro", version) for version in official.VERSIONS]
    monkeypatch.setattr(official, "models", lambda: published)
    monkeypatch.setattr(official, "shapes", lambda model: official.shapes_of(config(model)))
    recognise._known.cache_clear()
    yield published
    recognise._known.cache_clear()


@pytest.fixture(scope="session")
def draw():
    """Random tensors of given shapes, which must be different for the tests to see a mix-up."""

    def values(shapes, seed=0):
        rng = np.random.default_rng(seed)
        return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}

    return values


@pytest.fixture
def state(micro, draw):
    """State dict of the micro network, version 2.1."""
    return draw(official.shapes(micro[1]))


class Program:
    """Assembles pickles of torch's kind, sound or not, one instruction after another."""

    def __init__(self):
        self.code = b"\x80\x02"

    def raw(self, code):
        self.code += code
        return self

    def text(self, value):
        data = value.encode()
        return self.raw(b"X" + struct.pack("<I", len(data)) + data)

    def number(self, value):
        if -(2**31) <= value < 2**31:
            return self.raw(b"J" + struct.pack("<i", value))
        return self.raw(pickle.dumps(value, 2)[2:-1])

    def numbers(self, values):
        self.raw(b"(")
        for value in values:
            self.number(value)
        return self.raw(b"t")

    def name(self, name):
        module, _, attribute = name.rpartition(".")
        return self.raw(f"c{module}\n{attribute}\n".encode())

    def storage(self, key="0", numel=6, kind="torch.FloatStorage", word="storage"):
        self.raw(b"(").text(word).name(kind).text(key).text("cpu").number(numel)
        return self.raw(b"tQ")

    def tensor(self, shape=(2, 3), stride=(3, 1), offset=0, **storage):
        self.name("torch._utils._rebuild_tensor_v2").raw(b"(").storage(**storage)
        self.number(offset).numbers(shape).numbers(stride)
        return self.raw(b"\x89").name("collections.OrderedDict").raw(b")RtR")

    def table(self, build):
        """{"model": {...}} whose entries `build` adds as pairs of text and value."""
        self.raw(b"}").text("model").raw(b"}(")
        build(self)
        return self.raw(b"us").code + b"."


@pytest.fixture
def program():
    return Program


@pytest.fixture
def one_tensor():
    """The pickle {"model": {"w": tensor}} with any of the tensor's fields replaced."""

    def build(**fields):
        return Program().table(lambda p: p.text("w").tensor(**fields))

    return build


@pytest.fixture
def archive():
    """Bytes of a zip archive with the given members, as (name, content) pairs or a dict."""

    def build(members, compression=zipfile.ZIP_STORED, comment=b""):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as target:
            target.comment = comment
            for name, content in dict(members).items():
                target.writestr(zipfile.ZipInfo(name), content, compression)
        return buffer.getvalue()

    return build


@pytest.fixture
def checkpoint(archive):
    """Bytes of a torch checkpoint from its pickle and its storages."""

    def build(table, storages=None, **more):
        storages = {"0": np.arange(6, dtype=np.float32)} if storages is None else storages
        members = {"archive/data.pkl": table}
        for key, array in storages.items():
            members[f"archive/data/{key}"] = array if isinstance(array, bytes) else array.tobytes()
        members |= {f"archive/{name}": content for name, content in more.items()}
        return archive({**members, "archive/version": b"3\n"})

    return build
