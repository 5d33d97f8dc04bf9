"""The training step: pure, the same function under jit, pmap, shard_map and over any mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from sss_jax.axes import Array, Key, PyTree
from sss_jax.models.sss import SSSModel
from sss_jax.options import Options
from sss_jax.parallel import pmean
from sss_jax.ssl.self_sorting import ImageBank
from sss_jax.ssl.weak_to_strong import Batch, sss_loss
from sss_jax.train.guard import apply_if_finite
from sss_jax.train.optimizer import ema_update

Metrics = dict[str, Array]
TrainStep = Callable[[PyTree, Batch, Array], tuple[PyTree, Metrics]]


def make_train_step(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    axis: str | None = None,
) -> TrainStep:
    """Return `train_step(state, batch, key) -> (state, metrics)`.

    With `axis` the function is one shard of a pmap or shard_map over that axis and the batch is
    the shard's part; without it the batch is global. The update is applied only where loss and
    gradients are finite (`metrics["finite"]`); the step is counted either way.
    """

    def train_step(state: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[PyTree, Metrics]:
        step = state["step"]
        teacher = state["ema"] if options.semi.teacher == "ema" else state["params"]["net"]

        def loss_of(params: PyTree) -> tuple[Array, Metrics]:
            step_key = jax.random.fold_in(key, step)
            return sss_loss(
                params,
                teacher,
                batch,
                step_key,
                step,
                model=model,
                options=options,
                axis=axis,
                bank=ImageBank(**state["bank"]) if "bank" in state else None,
            )

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        bank = {"bank": aux.pop("bank")._asdict()} if "bank" in state else {}
        # The losses already sum over devices, and psum transposes to psum: each device holds
        # n times its share of the gradient, so the mean over devices is the global gradient.
        grads, aux = pmean(grads, axis), pmean(aux, axis)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        proposed = {
            "params": params,
            "ema": ema_update(state["ema"], params["net"], step, options.semi.ema_decay),
            "opt_state": opt_state,
            **bank,
        }
        grad_norm = optax.tree.norm(grads)
        # The norm is finite only if every gradient is: one test serves for hundreds of arrays.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        current = {name: state[name] for name in proposed}
        new_state = apply_if_finite(finite, proposed, current) | {"step": step + 1}
        metrics = aux | {
            "loss": loss,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return new_state, metrics

    return train_step


def root_key(seed: int) -> Key[Array, ""]:
    """Return the key of a run; steps and examples fold their numbers into it."""
    return jax.random.key(jnp.uint32(seed))
