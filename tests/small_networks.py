"""Networks of a few thousand parameters, with weights that look trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax.models.presets import Sam2Config

CONFIG = Sam2Config(
    image_size=64,
    embed_dim=8,
    depths=(1, 1, 2, 1),
    windows=(8, 4, 6, 3),
    global_blocks=(3,),
    width=16,
    decoder_heads=2,
    decoder_mlp=32,
    upscale_channels=(8, 4),
    head_hidden=16,
    memory_width=4,
    memory_layers=1,
    memory_mlp=16,
)

# A coarse grid of four cells, and a short memory, so that slices are forgotten soon.
TRACKING_CONFIG = dataclasses.replace(
    CONFIG,
    image_size=32,
    depths=(1, 1, 1, 1),
    windows=(8, 4, 2, 1),
    global_blocks=(2,),
    decoder_mlp=16,
    memory_width=8,
    num_maskmem=3,
    max_pointers=4,
)


def with_memory(micro, kind):
    """The set-up with or without the parts for memory, which double what is to be compiled."""
    model, options, batch = micro
    config = dataclasses.replace(model.config, memory=kind != "none")
    memory = dataclasses.replace(options.memory, kind=kind)
    return model.clone(config=config), dataclasses.replace(options, memory=memory), batch


def random_params(model, seed=0):
    side = model.config.size_multiple
    args = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    generator = np.random.default_rng(seed)

    def draw(path, x):
        noise = generator.standard_normal(x.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return noise / np.sqrt(np.prod(x.shape[:-1]), dtype=np.float32)
        if path[-1].key in ("scale", "bias"):
            return 0.2 * noise + float(path[-1].key == "scale")
        return noise

    return jax.tree.map_with_path(draw, shapes)


def params_that_find(model, seed):
    """Draw parameters with which objects are there, so that masks can be looked at."""
    params = random_params(model, seed)
    params["sam_mask_decoder"]["pred_obj_score_head"]["layers_2"]["bias"] += 4.0
    return params
