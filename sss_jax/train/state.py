"""The train state: a plain nested dict, so that every tool of JAX can hold it.

    {"params": {"net": ..., "dfe": ...}, "ema": <like net>, "opt_state": ..., "step": int32}

With `memory.kind=self_sorting` there is also "bank", the self-sorting bank as a dict. `ema` is the
teacher and, by default, what predicts. Random keys are not part of it: the key of step t is
`fold_in(key(seed), t)`.
"""

import jax
import jax.numpy as jnp
import optax

from sss_jax.axes import Array, Key, PyTree
from sss_jax.models.sss import SSSModel, init_params
from sss_jax.options import Options
from sss_jax.ssl.dfe import init_dfe


def state_of(
    params: PyTree, optimizer: optax.GradientTransformation, memory: PyTree | None = None
) -> PyTree:
    """Return the state of step 0 with these parameters, the teacher being a copy of the student.

    `memory` is what `ssl.self_sorting.empty_bank` returns.
    """
    return (memory or {}) | {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params["net"]),
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def init_all_params(model: SSSModel, options: Options, key: Key[Array, ""]) -> PyTree:
    """Return the parameters of the network and of DFE."""
    key_net, key_dfe = jax.random.split(key)
    params = {"net": init_params(model, key_net)}
    if options.semi.enabled and options.dfe.enabled:
        # Beside converted weights DFE starts silent: they were trained without it.
        scale = 0.0 if options.model.init else 1.0
        params["dfe"] = init_dfe(key_dfe, model.config.width, options.dfe, scale)
    return params


def count_params(tree: PyTree) -> int:
    """Count the numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
