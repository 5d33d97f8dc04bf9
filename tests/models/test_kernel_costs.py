"""What the TPU kernels say that they compute, against the products that stand in them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sss_jax import flops
from sss_jax.models.hiera import Hiera
from sss_jax.models.memory_attention import MemoryAttention, MemoryKeys
from sss_jax.models.presets import preset

CONFIG = functools.partial(preset, dtype="bfloat16", kernels="tpu")


def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def kernels_of_the_gradient(apply, init, *args):
    """Kernels of a module's forward and backward pass; nothing runs."""
    params = jax.eval_shape(init, jax.random.key(0), *args)

    def loss(params, *args):
        leaves = jax.tree.leaves(apply(params, *args))
        return sum(jnp.square(y.astype(jnp.float32)).sum() for y in leaves)

    return flops.kernels(flops.trace(jax.grad(loss), params, *args))


def of_the_trunk(name):
    trunk = Hiera(CONFIG(name, 256))
    return kernels_of_the_gradient(trunk.apply, trunk.init, like(2, 256, 256, 3))


def of_memory_attention():
    module, spatial = MemoryAttention(CONFIG("tiny", 1024)), 4096
    attend = lambda run: lambda p, x, v, k, on: run(p, x, MemoryKeys(v, k, on, spatial))  # noqa: E731
    memory = like(1, 2, spatial + 8, 64)
    return kernels_of_the_gradient(
        attend(module.apply),
        attend(module.init),
        like(1, 64, 64, 256),
        memory,
        memory,
        like(1, 2, spatial + 8, dtype=bool),
    )


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        (functools.partial(of_the_trunk, "tiny"), {"window_block", "window_attention", "mlp"}),
        (functools.partial(of_the_trunk, "base_plus"), {"window_block", "mlp"}),
        (of_memory_attention, {"attention", "projection", "mlp"}),
    ],
    ids=["tiny's trunk", "base_plus's trunk", "memory attention"],
)
def test_kernels_say_what_they_compute(kernels, expected):
    found = kernels()
    for kernel in found:
        computed = sum(2 * p.rows * p.columns * p.depth * p.times for p in kernel.products)
        assert kernel.operations == computed, kernel.name
    names = {kernel.name for kernel in found}
    assert {f"{name}_{way}" for name in expected for way in ("forward", "backward")} <= names
