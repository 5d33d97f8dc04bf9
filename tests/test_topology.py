"""Names of machines, and roofs of kernels."""

import pytest

from sss_jax import roofline
from sss_jax.errors import ConfigError
from sss_jax.flops import Kernel, Product
from sss_jax.hlo import Collective, Cost
from sss_jax.topology import parse


@pytest.mark.parametrize(
    ("name", "chips", "slices", "grid"),
    [
        ("v5e-1", 1, 1, "1x1"),
        ("v5e-8", 8, 1, "2x4"),
        ("v5e-16", 16, 1, "4x4"),
        ("v6e-256", 256, 1, "16x16"),
        ("2xv5e-16", 16, 2, "4x4"),
        ("v5p-8", 4, 1, "2x2x1"),
        ("v5p-16", 8, 1, "2x2x2"),
        ("v5p-64", 32, 1, "2x4x4"),
        ("V5P-128", 64, 1, "4x4x4"),
    ],
)
def test_names(name, chips, slices, grid):
    found = parse(name)
    assert (found.chips, found.slices, found.grid) == (chips, slices, grid)
    assert found.devices == chips * slices
    assert found.is_tpu


@pytest.mark.parametrize(
    ("name", "grid", "groups"),
    [("h100-1", "1x1", 1), ("h200-6", "1x6", 1), ("a100-8", "1x8", 1), ("2xh100-16", "2x8", 4)],
)
def test_gpus_are_hosts_of_eight(name, grid, groups):
    found = parse(name)
    assert not found.is_tpu
    assert (found.grid, found.groups) == (grid, groups)


def test_gpus_beyond_a_host_are_whole_hosts():
    with pytest.raises(ConfigError, match="whole hosts"):
        parse("h100-12")


@pytest.mark.parametrize("name", ["v5e", "v9-16", "v5e-12", "v5p-3", "v5e-0", "0xv5e-16", "", "16"])
def test_unknown_names_say_what_is_known(name):
    with pytest.raises(ConfigError, match=r"v5[ep]-N"):
        parse(name)


def test_a_kernel_takes_the_larger_of_its_two_roofs():
    topology = parse("v5e-16")
    assert roofline.roof(Cost("", 197 * 10**12, 1, 1, True), topology) == pytest.approx(1.0)
    assert roofline.roof(Cost("", 1, 819 * 10**9, 1, True), topology) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("product", "chip", "share"),
    [
        ((256, 128, 128), "v5e-16", 1.0),
        ((256, 96, 128), "v5e-16", 0.75),  # columns of a tile
        ((128, 128, 64), "v5p-64", 0.5),  # half of the depth
        ((4, 128, 128), "v5e-16", 0.5),  # rows pass eight at a time
        ((256, 128, 128), "v6e-256", 0.25),
    ],
)
def test_products_fill_whole_tiles_of_the_matrix_unit(product, chip, share):
    kernels = [Kernel("k", 3, 0, (Product(*product, times=5),))]
    assert roofline.fill(kernels, parse(chip)) == pytest.approx(share)
    assert roofline.fill([*kernels, *kernels], parse(chip)) == pytest.approx(share)


def test_often_computed_products_weigh_more():
    full, half = Product(128, 128, 128, times=3), Product(128, 128, 64, times=1)
    one = roofline.fill([Kernel("k", 2, 0, (full, half))], parse("v5e-16"))
    assert one == pytest.approx((3 + 0.5) / (3 + 1))
    two = roofline.fill([Kernel("a", 1, 0, (full,)), Kernel("b", 6, 0, (half,))], parse("v5e-16"))
    assert two == pytest.approx((3 + 3) / (3 + 6))
    assert roofline.fill([], parse("v5e-16")) is None


def test_an_all_reduce_sends_twice_and_slices_share_their_network():
    one, two = parse("v5e-16"), parse("2xv5e-16")
    gather = Collective("all-gather", 2 * 10**9, 1, True, "")
    reduce = gather._replace(kind="all-reduce")
    assert roofline.exchange_time(gather, one) == pytest.approx(0.01)
    assert roofline.exchange_time(reduce, one) == pytest.approx(0.02)
    assert roofline.exchange_time(gather, two) == pytest.approx(0.01 + 2 / 16 / 3.125)
    assert roofline.exchange_time(gather, parse("h100-8")) == pytest.approx(2 / 450)
    hosts = 2 / 450 + 2 / 8 / 50
    assert roofline.exchange_time(gather, parse("h100-32")) == pytest.approx(hosts)


def test_parts_add_up_to_the_whole():
    topology = parse("v5e-16")
    costs = [
        Cost("jit(step)/jvp(SSSModel.encode)/trunk/blocks_0", 10**9, 10**6, 2, True),
        Cost("jit(step)/transpose(jvp(SSSModel.encode))/trunk/blocks_0", 10**9, 10**6, 1, True),
        Cost("jit(step)/dfe/add", 0, 10**8, 1, True),
        Cost("", 0, 10**3, 1, True),
    ]
    rows = roofline.by_part(costs, topology)
    assert {row["part"] for row in rows} == {"trunk", "trunk, backward", "dfe", "other"}
    assert rows[0]["part"] == "dfe"
    assert sum(row["flops"] for row in rows) == 3 * 10**9
    total = sum(roofline.roof(c, topology) * c.times for c in costs)
    assert sum(row["seconds"] for row in rows) == pytest.approx(total)


def test_exchanges_are_grouped_largest_first():
    rows = roofline.by_source(
        [
            Collective("all-reduce", 4, 3, True, "jit(step)/losses/psum"),
            Collective("reduce-scatter", 100, 1, True, "jit(step)/reduce_gradients/psum_scatter"),
            Collective("all-reduce", 8, 1, False, "jit(step)/losses/psum"),
        ]
    )
    assert [(row["kind"], row["part"], row["bytes"]) for row in rows] == [
        ("reduce-scatter", "reduce_gradients", 100),
        ("all-reduce", "losses", 20),
    ]
    assert rows[1]["number"] == 4
    assert not rows[1]["exact"]
