"""Floating-point operations of a traced function, loops counted as often as they run.

XLA's own count takes the body of a loop once, and the memory scan of the step is a loop. Here the
jaxpr is walked: products of matrices and convolutions, two operations per multiply-add, times the
length of every scan. Element-wise work is left out, as is usual where a rate is compared with what
matrix units can do.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

__all__ = ["Kernel", "Product", "count", "inner", "kernels", "operations", "trace"]


AGAIN = "computed_again"
"""Name of jitted functions that a backward pass calls for what the forward pass had and dropped."""
_LEAVES = ("dot_general", "conv_general_dilated", "pallas_call")


class Product(NamedTuple):
    """A product of matrices inside a kernel.

    Attributes:
        rows: of the result.
        columns: of the result.
        depth: what is summed over.
        times: how often it is computed.
    """

    rows: int
    columns: int
    depth: int
    times: int


class Kernel(NamedTuple):
    """A kernel of our own.

    Attributes:
        name: its name.
        times: how often it runs.
        operations: of one run, as it says.
        products: of one run, as it is written.
    """

    name: str
    times: int
    operations: int
    products: tuple[Product, ...]


def count(function: Callable[..., Any], *args: Any, again: bool = True) -> int:
    """Count the operations of `function(*args)` without running it.

    Args:
        function: pure function of arrays.
        args: arrays or `jax.ShapeDtypeStruct`s.
        again: count functions named AGAIN too; not so for the operations of a model.

    Returns:
        Operations of all devices together. A `while` whose length depends on the data counts one
        turn, a `cond` its dearest branch; code that differs by platform counts as on CPUs. What no
        result needs counts nothing: a compiler drops it. A kernel counts what it says of itself.
    """
    return operations(trace(function, *args), again=again)


def trace(function: Callable[..., Any], *args: Any) -> core.Jaxpr:
    """Trace a function, without what no result needs; arguments as for `count`."""
    whole = jax.make_jaxpr(function)(*args).jaxpr
    return partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))[0]


def operations(traced: core.Jaxpr, *, again: bool = True) -> int:
    """Count the operations of a traced function, as `count` does."""
    return sum(times * _of_equation(e, again) for e, times in _leaves(traced, again))


def kernels(traced: core.Jaxpr) -> list[Kernel]:
    """Return every kernel of our own that a traced function runs."""
    leaves = _leaves(traced, True)
    return [_kernel(e, times) for e, times in leaves if e.primitive.name == "pallas_call"]


def _leaves(jaxpr: core.Jaxpr, again: bool, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield products, convolutions and kernels, and how often they run."""
    needed = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    needed |= {id(x) for x in jaxpr.outvars}
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _LEAVES:
            # A kernel whose results have no use: JAX itself keeps it, the compiler drops it.
            if name != "pallas_call" or any(id(x) in needed for x in equation.outvars):
                yield equation, times
        elif name == "cond":
            yield from _leaves(_dearest(params, again), again, times)
        elif again or name != "jit" or params["name"] != AGAIN:
            turns = params["length"] if name == "scan" else _devices(name, params)
            for within in inner(params):
                yield from _leaves(within, again, times * turns)


def _dearest(params: dict[str, Any], again: bool) -> core.Jaxpr:
    """Return the branch that costs most; that of CPUs, where platforms differ."""
    branches = inner(params)
    platforms = [names or ("cpu",) for names in params.get("branches_platforms") or ()]
    cpu = [one for one, names in zip(branches, platforms, strict=False) if "cpu" in names]
    return cpu[0] if cpu else max(branches, key=lambda one: operations(one, again=again))


def _of_equation(equation: Any, again: bool) -> int:
    if equation.primitive.name == "dot_general":
        return _of_product(equation)
    if equation.primitive.name == "conv_general_dilated":
        return _of_convolution(equation)
    said = equation.params["cost_estimate"]
    if said:
        return int(said.flops)
    return _steps(equation) * operations(equation.params["jaxpr"], again=again)


def _steps(kernel: Any) -> int:
    """How often the body of a kernel runs."""
    return math.prod(kernel.params["grid_mapping"].grid)


def _kernel(equation: Any, times: int) -> Kernel:
    params = equation.params
    name = str(params.get("name") or params["name_and_src_info"].name)
    within = _leaves(params["jaxpr"], True, _steps(equation))
    products = tuple(_product(*leaf) for leaf in within)
    return Kernel(name, times, _of_equation(equation, True), products)


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


def _product(equation: Any, times: int) -> Product:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left, right = (x.aval.shape for x in equation.invars)
    depth = math.prod(left[i] for i in contracted)
    batch = math.prod(left[i] for i in batched)
    rows, columns = (math.prod(side) // depth // batch for side in (left, right))
    return Product(rows, columns, depth, batch * times)


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
