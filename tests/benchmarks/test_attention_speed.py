"""The race of large attention: all sides agree, and one that does not is refused."""

import json

import jax
import pytest

from sss_jax.benchmarks import attention_speed as race

pytestmark = pytest.mark.usefixtures("mixing")
SMALL = race.Size("small", 2, 3, 2, 1, 16, 8)


@pytest.fixture
def mixing():
    """Let JAX's own attention mix types, as it does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("dtype", race.DTYPES)
def test_all_sides_are_timed(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(race, "SIZES", (SMALL,))
    words = ["--size", "128", "--repeats", "1", "--dtype", dtype, "-o", str(tmp_path / "a.json")]
    assert race.main(words) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    (row,) = found["rows"]
    assert set(row["times_s"]) == {"loop", "jax"}, "no kernels on a CPU"
    assert row["speedup"]["jax"] > 0
    assert row["differ_by"]["jax"] < race.TOLERANCE[dtype]


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.01), (1.01, 1.0, 1.0), (1.0, 1.01, 1.0)])
def test_sides_that_differ_are_refused(monkeypatch, factors):
    def wrong(*arrays):
        return race.by_jax(*(f * x for f, x in zip(factors, arrays, strict=True)))

    monkeypatch.setattr(race, "ways", lambda: {"loop": race.large_attention, "wrong": wrong})
    with pytest.raises(SystemExit, match=r"small: attention differs by \{'wrong'"):
        race.compare(SMALL, 8, "float32", 1)
