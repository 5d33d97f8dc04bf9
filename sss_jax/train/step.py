"""The training step: pure, the same function under jit, pmap, shard_map and over any mesh."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sss_jax.axes import Array, Key, PyTree
from sss_jax.models.sss import SSSModel
from sss_jax.options import Options
from sss_jax.parallel import Axis, pmean
from sss_jax.ssl.self_sorting import ImageBank
from sss_jax.ssl.weak_to_strong import Batch, sss_loss
from sss_jax.train.guard import apply_if_finite
from sss_jax.train.optimizer import ema_update

Metrics = dict[str, Array]
TrainStep = Callable[[PyTree, Batch, Array], tuple[PyTree, Metrics]]


class Gradients(NamedTuple):
    """What one batch says about the parameters.

    Attributes:
        of_params: gradient of the loss over the global batch, as the parameters lie.
        loss: that loss.
        aux: scalars to log.
        bank: the self-sorting bank after the batch, or an empty dict.
    """

    of_params: PyTree
    loss: Array
    aux: Metrics
    bank: PyTree


class Exchange(NamedTuple):
    """How devices put parameters together and share gradients out.

    Attributes:
        whole: from what a device holds to all parameters.
        reduce: from gradients of all parameters, for one device's share of the batch, to the
            average over devices of what a device holds.
    """

    whole: Callable[[PyTree], PyTree]
    reduce: Callable[[PyTree], PyTree]


GradientFunction = Callable[[PyTree, PyTree, PyTree, Batch, Array, Array], Gradients]


def make_gradients(
    model: SSSModel, options: Options, axis: Axis | None = None, exchange: Exchange | None = None
) -> GradientFunction:
    """Return `gradients(params, teacher, bank, batch, key, step) -> Gradients`.

    With `axis` the function is one shard of a pmap or shard_map over that axis and the batch is
    the shard's part; without it the batch is global. With `train.accumulate` above 1 the batch is
    cut into that many, one after the other, and the average is returned.
    """
    devices = exchange or Exchange(lambda tree: tree, lambda tree: pmean(tree, axis))
    parts = options.train.accumulate

    def of_batch(
        params: PyTree, teacher: PyTree, bank: PyTree, batch: Batch, key: Array, step: Array
    ) -> Gradients:
        def loss_of(params: PyTree) -> tuple[Array, Metrics]:
            held = ImageBank(**bank) if bank else None
            return sss_loss(
                params,
                teacher,
                batch,
                key,
                step,
                model=model,
                options=options,
                axis=axis,
                bank=held,
            )

        (loss, aux), found = jax.value_and_grad(loss_of, has_aux=True)(params)
        new_bank = aux.pop("bank")._asdict() if bank else {}
        return Gradients(found, loss, aux, new_bank)

    def gradients(
        params: PyTree, teacher: PyTree, bank: PyTree, batch: Batch, key: Array, step: Array
    ) -> Gradients:
        held = devices.whole({"params": params, "ema": teacher})
        params, teacher = held["params"], held["ema"]
        step_key = jax.random.fold_in(key, step)
        if parts == 1:
            found = of_batch(params, teacher, bank, batch, step_key, step)
        else:
            found = _accumulate(
                lambda bank, part, number: of_batch(
                    params, teacher, bank, part, jax.random.fold_in(step_key, number), step
                ),
                bank,
                batch,
                parts,
            )
        # The losses already sum over devices, and psum transposes to psum: each device holds
        # n times its share of the gradient, so the mean over devices is the global gradient.
        return found._replace(of_params=devices.reduce(found.of_params), aux=pmean(found.aux, axis))

    return gradients


def _accumulate(
    of_part: Callable[[PyTree, Batch, Array], Gradients], bank: PyTree, batch: Batch, parts: int
) -> Gradients:
    """Average over micro-batches; number j takes the clips j, j + parts, j + 2 parts, ...

    So a device that holds neighbouring clips holds an equal share of every micro-batch, whatever
    the number of devices.
    """

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)

    def add(carry: Gradients, part: tuple[Batch, Array]) -> tuple[Gradients, None]:
        new = of_part(carry.bank, *part)
        total = jax.tree.map(jnp.add, carry._replace(bank={}), new._replace(bank={}))
        return total._replace(bank=new.bank), None

    steps = jax.tree.map(split, batch), jnp.arange(parts)
    shapes = jax.eval_shape(of_part, bank, *jax.tree.map(lambda x: x[0], steps))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(bank=bank)
    total, _ = jax.lax.scan(add, zero, steps)
    mean = jax.tree.map(lambda x: x / parts, total._replace(bank={}))
    return mean._replace(bank=total.bank)


def make_train_step(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    axis: Axis | None = None,
    gradients: GradientFunction | None = None,
) -> TrainStep:
    """Return `train_step(state, batch, key) -> (state, metrics)`.

    With `axis` the function is one shard of a pmap over that axis and the batch is the shard's
    part; without it the batch is global. `gradients` replaces what `make_gradients` would make,
    for devices that exchange them in another way. The update is applied only where loss and
    gradients are finite (`metrics["finite"]`); the step is counted either way.
    """
    gradients = gradients or make_gradients(model, options, axis)

    def train_step(state: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[PyTree, Metrics]:
        step, params = state["step"], state["params"]
        teacher = state["ema"] if options.semi.teacher == "ema" else params["net"]
        found = gradients(params, teacher, state.get("bank", {}), batch, key, step)
        grads = found.of_params
        grad_norm = optax.tree.norm(grads)
        # The norm is finite only if every gradient is: one test serves for hundreds of arrays.
        finite = jnp.isfinite(found.loss) & jnp.isfinite(grad_norm)

        @jax.named_scope("optimizer")
        def update() -> PyTree:
            updates, opt_state = optimizer.update(grads, state["opt_state"], params)
            new = optax.apply_updates(params, updates)
            ema = ema_update(state["ema"], new["net"], step, options.semi.ema_decay)
            bank = {"bank": found.bank} if found.bank else {}
            return bank | {"params": new, "ema": ema, "opt_state": opt_state}

        current = {name: part for name, part in state.items() if name != "step"}
        new_state = apply_if_finite(finite, update, current) | {"step": step + 1}
        metrics = found.aux | {"loss": found.loss, "grad_norm": grad_norm, "finite": finite}
        return new_state, metrics

    return train_step


def root_key(seed: int) -> Key[Array, ""]:
    """Return the key of a run; steps and examples fold their numbers into it."""
    return jax.random.key(jnp.uint32(seed))
