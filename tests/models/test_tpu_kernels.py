"""The attention kernels compiled by TPU's own compiler, at the sizes of all networks.

Slow, and only where libtpu is installed. Values are tested without a TPU in test_attention.py and
test_window_kernel.py, test_window_block_kernel.py, test_mlp_kernel.py, test_projection_kernel.py.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sss_jax import compilers, topology
from sss_jax.models import (
    attention_kernel,
    mlp,
    mlp_kernel,
    projection_kernel,
    window_block_kernel,
    window_kernel,
)
from sss_jax.models.hiera import Hiera, block_table
from sss_jax.models.presets import preset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"),
]


@pytest.fixture(params=["v5e-4", "v5p-8", "v6e-4"])
def compile_for(request):
    devices = compilers.tpu_devices(topology.parse(request.param))[:1]
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


def gradients(function):
    """Of a function of tokens and weights; the last argument is the gradient of its result."""
    return lambda bar, x, *weights: jax.vjp(function, x, *weights)[1](bar)


def vectors(*shapes):
    return [(shape, jnp.float32) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["tiny", "base_plus", "large"])
def test_blocks_in_windows(compile_for, name, dtype):
    shapes = {shape for shape in block_table(preset(name)) if shape.window}
    for shape in sorted(shapes):
        tokens, across = shape.window**2, -(-64 // shape.window)
        queries = tokens // 4 if shape.pool else tokens
        group = window_kernel.group_of_windows(across, queries, tokens)
        if not window_block_kernel.suits(group * tokens, shape.width, shape.pool, dtype):
            continue
        d, c = shape.width, shape.width // 2 if shape.pool else shape.width
        more = [(c, d), (d,)] if shape.pool else []
        weights = vectors((c,), (c,), (c, 3 * d), (3 * d,), (d, d), (d,), *more)
        form = window_block_kernel.Form(
            shape.window, group, across, across // group, 64, 64, shape.heads, 1e-6, shape.pool
        )

        def attend(x, *weights, form=form):
            return window_block_kernel.attend(x, window_block_kernel.Weights(*weights), form)

        groups = 2 * across * across // group
        bar, x = ((groups, group * n, w) for n, w in ((queries, d), (tokens, c)))
        text = compile_for(gradients(attend), (bar, dtype), (x, dtype), *weights)
        assert "window_block_backward" in text


# Width and hidden width of the MLPs of all trunks, of memory attention and of the fuser.
WIDTHS = [(96, 384), (384, 1536), (768, 3072), (112, 448), (448, 1792), (144, 576), (576, 2304)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("widths", [*WIDTHS, (256, 2048), (256, 1024)])
def test_mlps(compile_for, widths, dtype):
    c, h = widths
    if not mlp_kernel.suits(8192, c, h, dtype):
        pytest.skip("computed by XLA")
    activation = mlp.RELU if h == 2048 else mlp.GELU

    def transform(x, *weights):
        form = mlp_kernel.Form(activation.with_slope, 1e-6, True)
        return mlp_kernel.transform(x, mlp_kernel.Weights(*weights), form)

    weights = vectors((c,), (c,), (c, h), (h,), (h, c), (c,))
    tokens = ((8192, c), dtype)
    assert "mlp_backward" in compile_for(gradients(transform), tokens, tokens, *weights)


# Heads, tokens and channels that come in; channels that go out; normalised; the form: memory
# attention's self-attention, its queries and keys, what is behind; global blocks of two trunks.
PROJECTIONS = [
    ((1, 4096, 256), 768, True, projection_kernel.Form(results=3, turned=2, through=True)),
    ((1, 4096, 256), 256, True, projection_kernel.Form(turned=1, through=True)),
    ((1, 12416, 64), 256, False, projection_kernel.Form(turned=1)),
    ((1, 4096, 64), 256, False, projection_kernel.Form()),
    ((1, 4096, 384), 1152, True, projection_kernel.Form(results=3, heads=4, through=True)),
    ((4, 4096, 96), 384, False, projection_kernel.Form()),
    ((1, 1024, 448), 1344, True, projection_kernel.Form(results=3, heads=8, through=True)),
    ((8, 1024, 56), 448, False, projection_kernel.Form()),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", PROJECTIONS)
def test_projections(compile_for, case, dtype):
    (heads, n, c), out, normed, form = case
    assert projection_kernel.suits(n, heads * c, out, dtype)

    def project(x, *weights):
        angle = jnp.ones((n, out // form.results // 2))
        made = projection_kernel.Weights(*weights)
        return projection_kernel.project(x, made, (angle, angle), None, form)

    weights = vectors((heads * c, out), (out,), *([(c,), (c,)] if normed else []))
    x = ((heads, 3, n, c), dtype)
    found = jax.eval_shape(project, *(jax.ShapeDtypeStruct(*a) for a in (x, *weights)))

    def back(*arguments):
        return gradients(project)(tuple(arguments[: len(found)]), *arguments[len(found) :])

    text = compile_for(back, *((a.shape, a.dtype) for a in found), x, *weights)
    assert "projection_backward" in text


def test_wide_blocks_as_a_loop(compile_for):
    """The compiler must not join a kernel with the loop's stack of gradients: it overruns then."""
    trunk = Hiera(preset("base_plus", 1024, "bfloat16", loop_blocks=True, kernels="tpu"))
    image = jnp.zeros((1, 1024, 1024, 3), jnp.bfloat16)
    shapes = jax.eval_shape(trunk.init, jax.random.key(0), image)["params"]
    leaves, structure = jax.tree.flatten(shapes)

    def gradient(image, *leaves):
        def total(params):
            levels = trunk.apply({"params": params}, image)
            return sum(level.astype(jnp.float32).sum() for level in levels)

        return jax.grad(total)(jax.tree.unflatten(structure, leaves))

    text = compile_for(gradient, (image.shape, image.dtype), *((x.shape, x.dtype) for x in leaves))
    assert "window_block_backward" in text
