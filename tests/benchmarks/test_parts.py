"""Where the time of a step goes: the parts are the step, and what bounds them follows."""

import jax
import jax.numpy as jnp
import pytest

from sss_jax import flops
from sss_jax.benchmarks import ceilings, counters, parts
from sss_jax.benchmarks.ceilings import Ceilings, bound
from sss_jax.benchmarks.request import Measured
from sss_jax.benchmarks.step_parts import WHOLE, step_parts
from sss_jax.errors import ConfigError

DEVICE = Ceilings(flops=1e12, bandwidth=1e11)


def cut(method, *changes):
    found = counters.small(method, *changes)
    return step_parts(
        found.options, found.setup, found.setup.state, found.batch, found.key, jax.eval_shape
    )


@pytest.mark.parametrize("method", [pytest.param("supervised", marks=pytest.mark.slow), "sss"])
def test_the_parts_of_the_step_have_its_operations(method):
    pieces = [p for p in cut(method) if p.in_step or p.name == WHOLE]
    counted = {p.name: flops.count(p.function, *p.args) for p in pieces}
    whole = counted.pop(WHOLE)
    assert sum(counted.values()) == pytest.approx(whole, rel=0.03), (counted, whole)
    expected = {"augmentation", "encoder forward and backward", "losses", "optimizer and EMA"}
    if method == "supervised":
        expected |= {"decoder forward and backward, no memory"}
    else:
        expected |= {"teacher's pseudo-labels", "DFE forward and backward", "PCSW"}
        expected |= {"memory scan forward and backward"}
    assert set(counted) == expected


def test_memory_between_images_is_not_cut():
    with pytest.raises(ConfigError, match="self_sorting"):
        cut("supervised", "memory.kind=self_sorting")


@pytest.mark.parametrize(
    ("seconds", "operations", "nbytes", "expected"),
    [
        (1.0, 0.9e12, 0.2e11, "compute"),
        (1.0, 0.2e12, 0.9e11, "memory"),
        (1.0, 0.6e12, 0.7e11, "memory"),
        (1.0, 0.7e12, 0.6e11, "compute"),
        (1.0, 0.5e12, 0.0, "compute"),
        (1.0, 0.49e12, 0.49e11, "latency"),
        (0.01, 0.0, 0.0, "latency"),
        (1.0, 0.0, 3e11, "memory"),
    ],
)
def test_what_bounds_a_part(seconds, operations, nbytes, expected):
    assert bound(seconds, operations, nbytes, DEVICE) == expected


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", None),
        ("cpu", None),
    ],
)
def test_devices_are_found_in_the_list_of_chips(kind, chip):
    assert ceilings.chip_name(kind) == chip


def test_rates_are_those_of_large_products_and_copies():
    assert 1e8 < ceilings.matmul_rate(256, repeats=2) < 1e14
    assert 1e8 < ceilings.copy_rate(2**22, repeats=2) < 1e14
    found = Ceilings(1.0, 2.0, "v5e").to_json()
    assert found["peak_bfloat16_flops_per_s"] == 197e12
    assert Ceilings(1.0, 2.0).to_json()["chip"] is None


def test_the_gradient_of_a_part_depends_on_its_outputs():
    """Constants in place of what comes back would let a compiler leave products out."""
    from sss_jax.benchmarks.step_parts import _with_backward

    x, w = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 4))
    both = _with_backward(lambda w, x: (x @ w, x.sum()), (0,))
    energy, (gradient,) = both(w, x)
    assert energy == jnp.sum((x @ w) ** 2) + x.sum() ** 2
    assert (gradient == 2 * x.T @ (x @ w)).all()


def test_the_table_adds_up_what_belongs_to_the_step():
    rows = [row(WHOLE, 1.0, False), row("one", 0.5, True), row("two", 0.3, True)]
    rows += [row("aside", 0.9, False) | {"loops_known": False}]
    more = {"ceilings": DEVICE.to_json()}
    lines = parts.render(Measured(rows, more)).splitlines()
    assert "large products reach 1000 GFLOP/s, copies 100.0 GB/s" in lines[0]
    assert "sss: parts marked + take 80% of the step" in lines
    assert [line.split()[-1] for line in lines[2:6]] == ["memory"] * 4
    assert len({len(line) for line in lines[2:6]}) == 1, "columns are aligned"
    assert "~" in lines[5]
    assert "~ loops of unknown length" in lines[-1]


def row(name, seconds, in_step):
    return {
        "name": f"sss: {name}",
        "part": name,
        "in_step": in_step,
        "flops": 10**9,
        "bytes": 10**9,
        "loops_known": True,
        "time_s": {"median": seconds, "low": seconds, "high": seconds},
        "flops_per_s": 1e9 / seconds,
        "bytes_per_s": 1e9 / seconds,
        "share": seconds,
        "bound": "memory",
    }
