"""Networks are recognised by names and shapes; everything else is refused with a list."""

import ml_dtypes
import numpy as np
import pytest

from sss_jax.conversion import official, recognise
from sss_jax.conversion.official import Model
from sss_jax.conversion.tensors import Spec, lazy
from sss_jax.errors import CheckpointError

FLOAT32 = np.dtype(np.float32)
TINY = Model("tiny", "2.1")


def specs(model=TINY):
    return {name: Spec(shape, FLOAT32) for name, shape in official.shapes(model).items()}


@pytest.mark.parametrize("model", official.models(), ids=str)
def test_published_networks_are_recognised(model) -> None:
    assert recognise.identify(specs(model)) == model


def without(*names):
    return lambda table: [table.pop(name) for name in names]


def renamed(old, new):
    return lambda table: table.update({new: table.pop(old)})


def reshaped(name, *shape):
    return lambda table: table.update({name: Spec(shape, FLOAT32)})


def all_but_image(table):
    for name in [n for n in table if n.startswith(("memory", "obj_ptr", "no_obj", "mask_d"))]:
        del table[name]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (without("no_mem_embed"), ["SAM 2.1 tiny", "1 missing: 'no_mem_embed'"]),
        (renamed("no_mem_embed", "no_mem"), ["1 missing: 'no_mem_embed'", "1 extra: 'no_mem'"]),
        (lambda t: t.update(extra=Spec((1,), FLOAT32)), ["1 extra: 'extra'"]),
        (
            reshaped("no_obj_ptr", 1, 128),
            ["1 of another shape: 'no_obj_ptr (1, 128) instead of (1, 256)'"],
        ),
        (
            reshaped("no_obj_ptr", 256),
            ["'no_obj_ptr (256,) instead of (1, 256)'"],
        ),
        (
            without("no_obj_embed_spatial", "obj_ptr_tpos_proj.bias"),
            ["SAM 2.0 tiny", "1 extra: 'obj_ptr_tpos_proj.weight'"],
        ),
        (all_but_image, ["155 missing", "and 145 more", "memory parts are missing"]),
        (lambda t: t.clear(), ["it is no published SAM-2", "468 missing"]),
    ],
    ids=["missing", "renamed", "extra", "shape", "rank", "between versions", "image only", "empty"],
)
def test_others_are_refused_with_what_differs(change, lines) -> None:
    table = specs()
    change(table)
    with pytest.raises(CheckpointError) as error:
        recognise.identify(table)
    for line in lines:
        assert line in str(error.value)
    assert len(str(error.value)) < 2000


def test_names_in_messages_are_harmless() -> None:
    table = specs() | {"\x1b[31m\n" + "x" * 500: Spec((1,), FLOAT32)}
    with pytest.raises(CheckpointError) as error:
        recognise.identify(table)
    assert "\x1b" not in str(error.value)
    assert "x" * 100 not in str(error.value)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.bool_, np.float64])
def test_types_that_float32_cannot_hold_are_refused(dtype) -> None:
    tensors = lazy({"a": np.zeros(2, dtype), "b": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=f"1 tensors are neither .*'a {np.dtype(dtype)}'"):
        recognise.widened(tensors, [])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_types_are_widened_exactly(dtype) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16 if dtype == np.float32 else dtype)
    finite = every[np.isfinite(every.astype(np.float32))].astype(dtype)
    bad: list[str] = []
    wide = recognise.widened(lazy({"a": finite}), bad)
    assert wide.specs["a"] == Spec(finite.shape, FLOAT32)
    assert wide["a"].dtype == np.float32
    np.testing.assert_array_equal(wide["a"].astype(dtype).view(np.uint8), finite.view(np.uint8))
    assert bad == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_noted(value) -> None:
    bad: list[str] = []
    wide = recognise.widened(lazy({"a": np.float32([1, value]), "b": np.float32([1])}), bad)
    assert bad == []
    dict(wide)
    assert bad == ["a"]
