"""The oracle: transformers' Sam2 models with random weights that look trained."""

import re

import numpy as np
import torch
import transformers

from sss_jax.conversion.keymap import from_hugging_face, to_ours
from sss_jax.conversion.verify import their_model, vision_config
from sss_jax.models.presets import Sam2Config, preset
from sss_jax.models.sam2 import Sam2
from tests.parity.compare import errors

TOLERANCE = 1e-4


def video_reference(name: str, size: int, version: str = "2.1", seed: int = 0):
    """(`Sam2VideoModel`, our network, our parameters) with the same random weights."""
    config = preset(name, size, version=version)
    model = transformers.Sam2VideoModel(
        transformers.Sam2VideoConfig(
            vision_config=vision_config(config),
            prompt_encoder_config={"image_size": size},
            mask_decoder_config={"dynamic_multimask_via_stability": True},
            image_size=size,
            memory_attention_rope_feat_sizes=[size // 16] * 2,
            enable_occlusion_spatial_embedding=version == "2.1",
            enable_temporal_pos_encoding_for_object_pointers=version == "2.1",
        )
    ).eval()
    state = trained_like(model.state_dict(), seed)
    # Objects are there more often than not; without this half of all masks are constant.
    state["mask_decoder.pred_obj_score_head.proj_out.bias"] += 4.0
    return with_weights(model, state, config)


def image_reference(name: str, size: int):
    """(`Sam2Model`, our network without memory, our parameters) with the same random weights."""
    config = preset(name, size, memory=False)
    model = their_model(config)
    return with_weights(model, trained_like(model.state_dict(), 0), config)


def with_weights(model, state, config: Sam2Config):
    """Give both networks the same weights: the oracle, ours, and ours as parameters."""
    model.load_state_dict(state, strict=True)
    params = to_ours(from_hugging_face({k: v.numpy() for k, v in state.items()}))
    return model, Sam2(config), params


def trained_like(state, seed: int):
    """Random weights without zeros and ones, scaled so that activations keep their size."""
    generator = np.random.default_rng(seed)
    drawn = {}
    for key, value in state.items():
        noise = generator.standard_normal(value.shape)
        if value.ndim == 1 and not key.endswith("scale"):
            noise = 0.2 * noise + (1.0 if key.endswith("weight") else 0.0)
        elif key.endswith("weight") and not re.search(r"(_embed|_token|_tokens)\.weight$", key):
            noise = noise / np.sqrt(value[0].numel())
        elif "pos_embed" in key:
            noise = 0.5 * noise
        drawn[key] = torch.tensor(noise, dtype=torch.float32)
    frequencies = "prompt_encoder.shared_embedding.positional_embedding"
    drawn["shared_image_embedding.positional_embedding"] = drawn[frequencies]
    return drawn


def relative_error(ours, theirs) -> float:
    """Largest error as a share of the oracle's root mean square."""
    return errors(ours, theirs)[0]


def close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    """Assert the relative error, and print it."""
    error = relative_error(ours, theirs.detach().numpy())
    print(f"relative error {error:.2e}")
    assert error <= tolerance, f"relative error {error:.2e}"
