"""Equal layers as a loop: the compiler then sees one of them, whatever the depth.

Parameters keep a place of their own for every layer (weights are converted and frozen by name) and
are stacked where they are used.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, PyTree


class Run(NamedTuple):
    """Layers `first` to `first + period * times`; every `period` of them are the same again."""

    first: int
    period: int
    times: int

    @property
    def end(self) -> int:
        """Number of the first layer behind it."""
        return self.first + self.period * self.times


def find_runs(layers: Sequence[Hashable]) -> list[Run]:
    """Cut a row of layers into repeated groups, so that as few as possible stand in the program.

    Args:
        layers: shapes of the layers; equal ones are interchangeable.
    """
    count = len(layers)
    # best[i]: fewest layers in the program of those from i on, and the runs.
    best: list[tuple[int, list[Run]]] = [(0, [])] * (count + 1)
    for first in reversed(range(count)):
        candidates = [(1 + best[first + 1][0], [Run(first, 1, 1), *best[first + 1][1]])]
        for period in range(1, count - first + 1):
            for times in range(2, _repetitions(layers, first, period) + 1):
                run = Run(first, period, times)
                size, rest = best[run.end]
                candidates.append((period + size, [run, *rest]))
        best[first] = min(candidates, key=lambda found: (found[0], len(found[1])))
    return best[0][1]


def _repetitions(layers: Sequence[Hashable], first: int, period: int) -> int:
    times = 1
    group = list(layers[first : first + period])
    while list(layers[first + times * period : first + (times + 1) * period]) == group:
        times += 1
    return times


def loop(
    group: Sequence[nn.Module],
    params: Sequence[PyTree],
    x: Array,
    *rest: Any,
    remat: bool = False,
    policy: Callable[..., Any] | None = None,
) -> Array:
    """Apply a group of layers again and again, each time with the next parameters.

    Args:
        group: unbound layers; each maps x to an x of the same shape.
        params: parameters of all layers, in order; a multiple of the group.
        x: what goes in.
        rest: further arguments of every layer.
        remat: recompute the activations of a layer in the backward pass.
        policy: what is kept of them all the same (`jax.checkpoint_policies`).
    """
    count = len(group)
    stacked = [
        jax.tree.map(lambda *same: jnp.stack(same), *params[place::count]) for place in range(count)
    ]

    def turn(x: Array, owns: list[PyTree]) -> tuple[Array, None]:
        for layer, own in zip(group, owns, strict=True):
            x = apply(layer, own, x, *rest, remat=remat, policy=policy)
        return x, None

    return jax.lax.scan(turn, x, stacked)[0]


def single(
    owner: nn.Module,
    name: str,
    make: Callable[..., nn.Module],
    *args: Any,
    remat: bool,
    policy: Callable[..., Any] | None,
) -> Array:
    """Apply a layer of its own, where parameters are made too.

    Args:
        owner: the module whose layer it is; this is called from its compact method.
        name: name of the layer.
        make: returns the layer, given its `name` or `parent`.
        args: what goes in, and further arguments.
        remat: as for `loop`.
        policy: as for `loop`.
    """
    if not remat or owner.is_initializing():
        layer: Any = make(name=name)
        y: Array = layer(*args)
        return y
    params = owner.variables["params"][name]
    return apply(make(parent=None), params, *args, remat=True, policy=policy)


def apply(
    layer: nn.Module,
    params: PyTree,
    x: Array,
    *rest: Any,
    remat: bool = False,
    policy: Callable[..., Any] | None = None,
) -> Array:
    """Apply one unbound layer; arguments as for `loop`."""

    def call(params: PyTree, x: Array) -> Array:
        y: Any = layer.apply({"params": params}, x, *rest)
        return y

    return recomputed(call, policy)(params, x) if remat else call(params, x)


def recomputed(
    function: Callable[[PyTree, Array], PyTree], policy: Callable[..., Any] | None = None
) -> Callable[[PyTree, Array], PyTree]:
    """Return `function(params, x)` that recomputes its activations in the backward pass.

    All its gradients are made before the backward pass goes on: a compiler that puts off those of
    the parameters, which nothing waits for, keeps everything alive that they are made of.
    """
    lean = jax.checkpoint(function, policy=policy)
    return lambda params, x: lean(*_together(params, x))


@jax.custom_vjp
def _together(params: PyTree, x: Array) -> tuple[PyTree, Array]:
    """Return both as they are; their gradients wait for each other."""
    return params, x


def _forwards(params: PyTree, x: Array) -> tuple[tuple[PyTree, Array], None]:
    return (params, x), None


def _backwards(_: None, gradients: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
    found: tuple[PyTree, Array] = jax.lax.optimization_barrier(gradients)
    return found


_together.defvjp(_forwards, _backwards)
