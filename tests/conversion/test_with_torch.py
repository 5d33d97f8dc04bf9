"""Against torch and transformers, which the product itself never installs.

`pip install torch==2.13.0 && pip install transformers==5.23.0`.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sss_jax.conversion import keymap, official, recognise, sam2, verify  # noqa: E402
from sss_jax.conversion.official import Model  # noqa: E402
from sss_jax.conversion.safetensors_file import (  # noqa: E402
    read_safetensors,
    write_safetensors,
)
from sss_jax.conversion.tensors import Spec, Tensors  # noqa: E402
from sss_jax.conversion.torch_zip import read_torch, write_torch  # noqa: E402
from sss_jax.errors import CheckpointError  # noqa: E402
from sss_jax.models.presets import preset  # noqa: E402
from tests.parity.weights import official_weights  # noqa: E402


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_kind():
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    return {
        "plain": base,
        "transposed": base.transpose(0, 2),
        "slice": base[:, 1:, ::2],
        "part of the same storage": base[1],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "f16": torch.randn(5).half(),
        "bf16": torch.randn(5).bfloat16(),
        "f64": torch.randn(5).double(),
        "i64": torch.arange(5),
        "i32": torch.arange(5, dtype=torch.int32),
        "i16": torch.arange(5, dtype=torch.int16),
        "i8": torch.arange(5, dtype=torch.int8),
        "u8": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_files_of_torch_are_read(tmp_path, protocol, wrapper) -> None:
    state = every_kind()
    path = tmp_path / "x.pt"
    torch.save({wrapper: state} if wrapper else state, path, pickle_protocol=protocol)
    with read_torch(path) as found:
        assert list(found) == list(state)
        for name, tensor in state.items():
            assert found[name].shape == tuple(tensor.shape)
            assert found.specs[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
            assert found[name].tobytes() == bits(tensor.detach())


def test_checkpoint_of_a_training_run_is_read(tmp_path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    everything = {
        "epoch": 7,
        "model": torch.nn.DataParallel(layer).state_dict(),
        "optimizer": optimizer.state_dict(),
        "loss": [0.5, 0.25],
    }
    path = tmp_path / "x.pt"
    torch.save(everything, path)
    with read_torch(path) as found:
        assert list(found) == ["weight", "bias"]
        np.testing.assert_array_equal(found["weight"], layer.weight.detach().numpy())


@pytest.mark.parametrize("content", ["module", "legacy", "script"])
def test_other_files_of_torch_are_refused(tmp_path, content) -> None:
    path = tmp_path / "x.pt"
    layer = torch.nn.Linear(3, 2)
    if content == "module":
        torch.save(layer, path)
    elif content == "legacy":
        torch.save(layer.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.save(torch.jit.script(layer), path)
    with pytest.raises(CheckpointError):
        read_torch(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_ours(tmp_path, mmap) -> None:
    state = {name: t.detach() for name, t in every_kind().items()}
    arrays = {n: t.numpy() for n, t in state.items() if t.dtype != torch.bfloat16}
    path = tmp_path / "x.pt"
    write_torch(path, arrays)
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert list(found) == ["model"]
    assert list(found["model"]) == list(arrays)
    for name, tensor in found["model"].items():
        assert tensor.dtype == state[name].dtype
        assert tensor.shape == state[name].shape
        assert bits(tensor) == bits(state[name])


def test_safetensors_agree_with_their_own_library(tmp_path) -> None:
    library = pytest.importorskip("safetensors.torch")
    state = {name: t.detach().contiguous().clone() for name, t in every_kind().items()}
    library.save_file(state, tmp_path / "theirs", metadata={"format": "pt"})
    with read_safetensors(tmp_path / "theirs") as found:
        assert found.keys() == state.keys()
        assert all(found[name].tobytes() == bits(t) for name, t in state.items())
        write_safetensors(tmp_path / "ours", found, {"format": "pt"})
    back = library.load_file(tmp_path / "ours")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor)


@pytest.mark.parametrize("model", official.models(), ids=str)
def test_names_are_those_of_transformers(model) -> None:
    transformers = pytest.importorskip("transformers")
    one = verify.their_model
    with torch.device("meta"):
        vision = one(preset(model.variant, 1024)).config.vision_config
        new = model.version == "2.1"
        config = transformers.Sam2VideoConfig(
            vision_config=vision,
            enable_occlusion_spatial_embedding=new,
            enable_temporal_pos_encoding_for_object_pointers=new,
        )
        theirs = transformers.Sam2VideoModel(config).state_dict()
    specs = {n: Spec(tuple(t.shape), np.dtype(np.float32)) for n, t in theirs.items()}
    tensors = Tensors(specs, lambda name: np.broadcast_to(np.float32(0), specs[name].shape))
    assert keymap.naming(tensors) == "hugging face"
    found = keymap.from_hugging_face(tensors)
    assert recognise.identify(found.specs) == model
    back = keymap.to_hugging_face(found)
    assert {n: a.shape for n, a in back.items()} == {n: s.shape for n, s in specs.items()}


def test_official_size_goes_through_everything(tmp_path) -> None:
    """SAM 2.1 tiny as torch writes it: converted, compared with transformers, and written back."""
    pytest.importorskip("transformers")
    state = official_weights(preset("tiny"))
    source = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": {name: torch.from_numpy(array) for name, array in state.items()}}, source)
    lines: list[str] = []
    result = sam2.run(source, tmp_path / "tiny", verify=True, report=lines.append)
    assert (result["variant"], result["version"]) == ("tiny", "2.1")
    assert result["parameters"] == 38_962_498
    errors = {row["output"]: row["relative_error"] for row in result["parity"]}
    assert errors.keys() == {
        *("features 0", "features 1", "features 2"),
        *("mask logits", "estimated IoU", "object score"),
    }
    assert max(errors.values()) < verify.TOLERANCE
    assert len(lines) == 1 + len(errors)
    sam2.run(tmp_path / "tiny", tmp_path / "back.pt", to_torch=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True, mmap=True)["model"]
    assert list(back) == list(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name].numpy(), array)


def test_networks_that_differ_are_reported(tmp_path, monkeypatch) -> None:
    outputs = {"mask logits": np.ones((2, 3)), "object score": np.ones(2)}
    monkeypatch.setattr(verify.sam2, "load", lambda folder: (Model("tiny", "2.1"), {}))
    monkeypatch.setattr(verify, "_their_outputs", lambda *_: outputs)
    for change in (outputs["mask logits"] + 1.1e-4, np.full((2, 3), np.nan), np.ones((3, 2))):
        ours = outputs | {"mask logits": change}
        monkeypatch.setattr(verify, "_our_outputs", lambda *_, ours=ours: ours)
        with pytest.raises(CheckpointError, match=r"more than 0\.0001 in mask logits; do not use"):
            verify.verify(tmp_path, lambda line: None)
    close = outputs | {"mask logits": outputs["mask logits"] + 0.9e-4}
    monkeypatch.setattr(verify, "_our_outputs", lambda *_: close)
    assert [row["output"] for row in verify.verify(tmp_path, print)] == list(outputs)


@pytest.mark.parametrize("model", official.models(), ids=str)
def test_the_network_compared_is_the_one_converted(tmp_path, monkeypatch, model) -> None:
    """Every parameter that the network wants is in a checkpoint of its version."""
    seen = []
    monkeypatch.setattr(verify.sam2, "load", lambda folder: (model, {}))
    monkeypatch.setattr(verify, "_their_outputs", lambda config, *_: {})
    monkeypatch.setattr(verify, "_our_outputs", lambda config, *_: seen.append(config) or {})
    verify.verify(tmp_path, print)
    assert [(c.name, c.version, c.image_size) for c in seen] == [
        (model.variant, model.version, verify.SIZE)
    ]
