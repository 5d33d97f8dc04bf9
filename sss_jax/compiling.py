"""`jax.jit` with the compiler options that are quickest for large networks on CPUs.

XLA's CPU backend can hand products and element-wise chains to a library of fused kernels (YNN).
At SAM-2's sizes its plain products are quicker, and so is code in full vectors; see
docs/explanation/performance.md. Other platforms take no options.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

LARGE_IMAGE = 512
"""Side of images, in pixels, from which the options make training quicker; below, it is slower."""

_ONE = np.float32(1)

CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": "512",
}


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """Return the options for a platform; those that this version of XLA knows.

    Args:
        platform: "cpu", "gpu" or "tpu"; by default that of the default device.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    return {name: value for name, value in CPU_OPTIONS.items() if _known(name, value)}


@functools.cache
def _known(name: str, value: str) -> bool:
    # Experimental options come and go between versions, and an unknown one is an error.
    try:
        jax.jit(lambda x: x).lower(0.0).compile({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Return `jax.jit(function, **settings)` with `compiler_options`.

    No device is asked for before the first call, so that this may decorate functions of a module.
    JAX takes options for whole programs alone: inside another jitted function those of the outer
    one hold, and under `jax.grad` and `jax.vmap` there are none.
    """
    inside = jax.jit(function, **settings)

    @functools.cache
    def compiled() -> Any:
        return jax.jit(function, compiler_options=compiler_options(), **settings)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (inside if _transformed(args, kwargs) else compiled())(*args, **kwargs)

    call.compiled = compiled  # type: ignore[attr-defined]
    return call


def _transformed(*args: Any) -> bool:
    """Whether JAX transforms what is computed now, so that it is no program of its own."""
    tracers = (isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
    # Of constants alone the result tells: a jitted function records every operation.
    return any(tracers) or isinstance(jax.lax.neg(_ONE), jax.core.Tracer)
