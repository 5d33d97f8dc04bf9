"""Random weights that look trained, under the official names; needs neither torch nor JAX."""

import re

import numpy as np

from sss_jax.conversion import official
from sss_jax.models.presets import Sam2Config

TABLES = r"(_embed|_embeddings\.\d|_token|_tokens)\.weight$"
"""Learned vectors, which keep unit variance; other weights are scaled by what enters them."""

FAINT = {
    "image_encoder.trunk.patch_embed.proj.weight": 0.01,
    "image_encoder.trunk.patch_embed.proj.bias": 0.01,
    "image_encoder.trunk.pos_embed": 0.01,
    "image_encoder.trunk.pos_embed_window": 0.01,
    "sam_mask_decoder.transformer.layers.0.self_attn.out_proj.weight": 0.01,
    "sam_mask_decoder.transformer.layers.0.self_attn.out_proj.bias": 0.01,
}
"""Tensors that are made small: what they put out is normalised next, where epsilon then counts."""


def official_weights(config: Sam2Config, seed: int = 0, faint: bool = False):
    """Weights without zeros and ones, scaled so that activations keep their size.

    The stream is NumPy's legacy one, which never changes, because committed numbers hang on it.
    """
    generator = np.random.RandomState(seed)
    drawn = {}
    for name, shape in official.shapes_of(config).items():
        noise = generator.standard_normal(shape)
        if len(shape) == 1:
            noise = 0.2 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0)
        elif name.endswith("weight") and not re.search(TABLES, name):
            noise = noise / np.sqrt(np.prod(shape[1:]))
        elif "pos_embed" in name:
            noise = 0.5 * noise
        if faint:
            noise = FAINT.get(name, 1.0) * noise
        drawn[name] = noise.astype(np.float32)
    # Objects are there more often than not; without this half of all masks are constant.
    drawn["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 4.0
    return drawn
