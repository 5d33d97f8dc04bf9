"""Floating-point operations of a traced function, loops counted as often as they run.

XLA's own count takes the body of a loop once, and the memory scan of the step is a loop. Here the
jaxpr is walked: products of matrices and convolutions, two operations per multiply-add, times the
length of every scan. Element-wise work is left out, as is usual where a rate is compared with what
matrix units can do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

__all__ = ["count", "inner"]


AGAIN = "computed_again"
"""Name of jitted functions that a backward pass calls for what the forward pass had and dropped."""


def count(function: Callable[..., Any], *args: Any, again: bool = True) -> int:
    """Count the operations of `function(*args)` without running it.

    Args:
        function: pure function of arrays.
        args: arrays or `jax.ShapeDtypeStruct`s.
        again: count functions named AGAIN too; not so for the operations of a model.

    Returns:
        Operations of all devices together. A `while` whose length depends on the data counts one
        turn, a `cond` its dearest branch; code that differs by platform counts as on CPUs. What no
        result needs counts nothing: a compiler drops it.
    """
    traced = jax.make_jaxpr(function)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _of_jaxpr(used, again)


def _of_jaxpr(jaxpr: core.Jaxpr, again: bool) -> int:
    needed = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    needed |= {id(x) for x in jaxpr.outvars}
    return sum(_of_equation(e, again) for e in jaxpr.eqns if not _is_dead(e, needed))


def _is_dead(equation: Any, needed: set[int]) -> bool:
    """Whether a kernel's results have no use: JAX itself keeps it, the compiler drops it."""
    kernel = equation.primitive.name == "pallas_call"
    return kernel and not any(id(x) in needed for x in equation.outvars)


def _of_equation(equation: Any, again: bool) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_product(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "pallas_call" and params["cost_estimate"]:
        return int(params["cost_estimate"].flops)
    if name == "jit" and params["name"] == AGAIN and not again:
        return 0
    within = [_of_jaxpr(jaxpr, again) for jaxpr in inner(params)]
    if name == "scan":
        return params["length"] * sum(within)
    if name == "cond":
        platforms = [names or ("cpu",) for names in params.get("branches_platforms") or ()]
        cpu = [cost for cost, names in zip(within, platforms, strict=False) if "cpu" in names]
        return cpu[0] if cpu else max(within, default=0)
    return _devices(name, params) * sum(within)


def inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Return the jaxprs that an equation with these parameters runs."""
    values: list[Any] = []
    for value in params.values():
        values += value if isinstance(value, tuple | list) else [value]
    open_ones = (getattr(value, "jaxpr", value) for value in values)
    return [value for value in open_ones if isinstance(value, core.Jaxpr)]


def _devices(name: str, params: dict[str, Any]) -> int:
    """Number of devices that run the inside of a `shard_map`, which sees one device's share."""
    if name != "shard_map":
        return 1
    mesh, manual = params["mesh"], params.get("manual_axes", params["mesh"].axis_names)
    return math.prod(mesh.shape[axis] for axis in manual)


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _of_convolution(equation: Any) -> int:
    """Each output sums over the window and the input channels of its group.

    Zeros that a dilated input or kernel inserts are no work for anybody; they are left out, those
    of the padding are not.
    """
    params = equation.params
    kernel = equation.invars[1].aval.shape
    dims = params["dimension_numbers"]
    window = math.prod(kernel[i] for i in dims.rhs_spec[2:])
    channels = kernel[dims.rhs_spec[1]]
    zeros = math.prod(params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * window * channels // zeros
