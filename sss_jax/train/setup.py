"""A run described by shapes alone: network, optimizer, state and batch, nothing computed."""

from typing import NamedTuple

import jax
import numpy as np
import optax

from sss_jax.axes import PyTree
from sss_jax.models.sss import SSSModel, build_model
from sss_jax.options import Options
from sss_jax.ssl.self_sorting import empty_bank
from sss_jax.train.optimizer import make_optimizer
from sss_jax.train.state import init_all_params, state_of


class Setup(NamedTuple):
    """What a step is made of.

    Attributes:
        model: the network.
        optimizer: transformation of the gradients.
        memory: entry of the state for the self-sorting bank; empty without one.
        state: shapes of the train state.
    """

    model: SSSModel
    optimizer: optax.GradientTransformation
    memory: PyTree
    state: PyTree


def set_up(options: Options) -> Setup:
    """Trace what `options` describe; no array of the network is made."""
    model = build_model(options)
    memory = empty_bank(model, options.memory)
    params = jax.eval_shape(lambda k: init_all_params(model, options, k), key_shape())
    optimizer = make_optimizer(options.optimizer, options.train.steps, params)
    state = jax.eval_shape(lambda p: state_of(p, optimizer, memory), params)
    return Setup(model, optimizer, memory, state)


def key_shape() -> jax.ShapeDtypeStruct:
    """Return the shape of a key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def batch_fields(options: Options) -> PyTree:
    """Return the shapes of a global batch, as the loader makes it."""
    model, data, train = options.model, options.data, options.train
    sizes = {"labelled": train.labelled_batch}
    if options.semi.enabled:
        sizes["unlabelled"] = train.unlabelled_batch

    def stream(name: str, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
        side = data.canvas or model.image_size
        plane = (clips, data.clip_slices, side, side)
        fields = {
            "image": jax.ShapeDtypeStruct((*plane, 1), np.float32),
            "slice_mask": jax.ShapeDtypeStruct(plane[:2], np.bool_),
            "id": jax.ShapeDtypeStruct((clips,), np.int32),
        }
        if data.canvas:
            fields["placement"] = jax.ShapeDtypeStruct((clips, 6), np.int32)
        labels = {"label": jax.ShapeDtypeStruct(plane, np.int32)}
        return fields | labels if name == "labelled" else fields

    return {name: stream(name, clips) for name, clips in sizes.items()}
