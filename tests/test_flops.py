"""Operations of a traced function, against counts by hand and XLA's own."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sss_jax.flops import count
from sss_jax.models import attention, convolution

X = jnp.ones((4, 8))
W = jnp.ones((8, 16))
SQUARE = jnp.ones((8, 8))
IMAGE = jnp.ones((2, 8, 8, 6))


def convolve(image, kernel, stride=1, groups=1, padding="VALID"):
    return jax.lax.conv_general_dilated(
        image,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_product():
    assert count(jnp.dot, X, W) == 2 * 4 * 8 * 16
    batched = count(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, 4, 5)), jnp.ones((3, 5, 2))
    )
    assert batched == 2 * 3 * 4 * 5 * 2


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 3), (1, 6)])
def test_convolution_is_what_xla_counts(stride, groups):
    kernel = jnp.ones((3, 3, 6 // groups, 12))
    found = count(lambda i, k: convolve(i, k, stride, groups), IMAGE, kernel)
    side = 6 if stride == 1 else 3
    assert found == 2 * 2 * side**2 * 12 * 9 * 6 // groups
    compiled = jax.jit(lambda i, k: convolve(i, k, stride, groups)).lower(IMAGE, kernel)
    assert found == compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("stride", [1, 2])
def test_both_gradients_of_a_convolution_cost_as_much_as_it(stride):
    kernel = jnp.ones((2, 2, 6, 12))

    def loss(image, kernel):
        return convolve(image, kernel, stride, padding="SAME").sum()

    forward = count(loss, IMAGE, kernel)
    assert count(jax.value_and_grad(loss, (0, 1)), IMAGE, kernel) == pytest.approx(
        3 * forward, rel=0.3
    )


def test_loops_count_as_often_as_they_run():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ SQUARE, None), x, None, length=5)[0]

    once = 2 * 4 * 8 * 8
    assert count(loop, X) == 5 * once
    assert count(jax.jit(loop), X) == 5 * once
    assert count(jax.vmap(loop), jnp.ones((3, 4, 8))) == 15 * once
    assert count(jax.value_and_grad(lambda x: loop(x).sum()), X) == 10 * once


def test_a_branch_counts_its_dearest_side():
    def branch(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ SQUARE @ SQUARE, lambda x: x @ SQUARE, x)

    assert count(branch, X) == 2 * 2 * 4 * 8 * 8


def test_what_is_computed_again_counts_again():
    def once(w):
        return jnp.sin(X @ w) @ jnp.ones((16, 2))

    plain = count(jax.value_and_grad(lambda w: once(w).sum()), W)
    again = count(jax.value_and_grad(lambda w: jax.checkpoint(once)(w).sum()), W)
    assert again == plain + 2 * 4 * 8 * 16


def test_devices_add_up():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for specs, share in (((P(("a", "b")),), 1), ((P("a"),), 2)):
        over = jax.shard_map(
            lambda x: x @ SQUARE, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        assert count(over, jnp.ones((8, 8))) == share * 2 * 8 * 8 * 8


def test_code_that_differs_by_platform_counts_as_on_cpus():
    def product(x):
        return x @ SQUARE

    def twice(x):
        return x @ SQUARE @ SQUARE

    by_platform = jax.lax.platform_dependent
    assert count(lambda x: by_platform(x, tpu=twice, default=product), X) == count(product, X)
    assert count(lambda x: by_platform(x, cpu=product, default=twice), X) == count(product, X)


def test_what_no_result_needs_costs_nothing():
    x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def loss(kernel):
        return convolution.convolve(x, kernel, 2, 1).sum()

    def turns(kernel):
        turn = lambda total, _: (total + jax.grad(loss)(kernel), None)  # noqa: E731
        return jax.lax.scan(turn, kernel, length=3)[0]

    once = count(loss, kernel)
    # The gradient of the maps is written out beside the kernel's, and nobody asks for it.
    assert count(jax.grad(loss), kernel) == once
    assert count(turns, kernel) == 3 * once


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_kernel_whose_result_is_kept_is_not_computed_again(platform):
    x = jnp.ones((1, 256, 64))

    def loss(x):
        return jnp.tanh(attention._streamed(jnp.sin(x), x, x, None, platform)).sum()

    def operations(*policy):
        lean = jax.checkpoint(loss, policy=policy[0]) if policy else loss
        return count(jax.value_and_grad(lean), x)

    forward = 2 * 256 * 256 * (64 + 64)
    plain = operations()
    assert operations(attention.KEEPS["attention"]) == plain
    assert operations(attention.KEEPS["nothing"]) == plain + forward
