"""The attention kernels compiled by TPU's own compiler, at the sizes of all networks.

Slow, and only where libtpu is installed. Values are tested without a TPU in test_attention.py and
test_window_kernel.py.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sss_jax import estimate, topology
from sss_jax.models import attention_kernel, window_kernel
from sss_jax.models.hiera import block_table
from sss_jax.models.presets import preset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]


@pytest.fixture(params=["v5e-4", "v5p-8", "v6e-4"])
def compile_for(request):
    devices = estimate.tpu_devices(topology.parse(request.param))[:1]
    here = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())

    def compile_(function, *shapes):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        jitted = jax.jit(function, in_shardings=here, out_shardings=here)
        return jitted.lower(*arrays).compile().as_text()

    return compile_


# Queries, keys, channels of both and of the values: memory, itself, the trunk's global blocks.
LARGE = [(4096, 12336, 256, 64), (4096, 4096, 256, 256), (4096, 4096, 96, 96), (1024, 4096, 56, 56)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", LARGE)
def test_large_attention(compile_for, shape, dtype):
    n, m, d, e = shape
    arrays = [((3, n, d), dtype), ((3, m, d), dtype), ((3, m, e), dtype), ((3, m), jnp.float32)]
    assert "attention_forward" in compile_for(attention_kernel.forward, *arrays)
    more = [((3, n), jnp.float32)] * 2 + [((3, n, e), dtype)]
    assert "attention_backward" in compile_for(attention_kernel.backward, *arrays, *more)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["tiny", "base_plus", "large"])
def test_windows(compile_for, name, dtype):
    shapes = {shape for shape in block_table(preset(name)) if shape.window}
    for shape in sorted(shapes):
        tokens = shape.window**2
        queries = tokens // 4 if shape.pool else tokens
        group = window_kernel.group_of_windows(32, queries, tokens)
        held = [(queries, 1), (tokens, 2)] if shape.pool else [(tokens, 3)]
        arrays = [((32 // group, group * n, part * shape.width), dtype) for n, part in held]
        bar = ((32 // group, group * queries, shape.width), dtype)

        def gradients(bar, *projections, heads=shape.heads, group=group):
            attend = lambda x: window_kernel.attend(x, heads, group)  # noqa: E731
            return jax.vjp(attend, projections)[1](bar)

        text = compile_for(gradients, bar, *arrays)
        assert "window_attention_backward" in text
