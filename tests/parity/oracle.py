"""The oracle: transformers' Sam2 models with random weights that look trained."""

import torch
import transformers

from sss_jax.conversion.keymap import from_hugging_face, to_hugging_face, to_ours
from sss_jax.conversion.verify import their_model, vision_config
from sss_jax.models.presets import Sam2Config, preset
from sss_jax.models.sam2 import Sam2
from tests.parity.compare import errors
from tests.parity.weights import official_weights

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
    return with_weights(model, config, seed)


def image_reference(name: str, size: int):
    """(`Sam2Model`, our network without memory, our parameters) with the same random weights."""
    config = preset(name, size, memory=False)
    model = their_model(config)
    return with_weights(model, config)


def with_weights(model, config: Sam2Config, seed: int = 0):
    """Give both networks the same weights: the oracle, ours, and ours as parameters."""
    state = to_hugging_face(official_weights(config, seed))
    state = {name: torch.from_numpy(state[name]) for name in model.state_dict()}
    model.load_state_dict(state, strict=True)
    params = to_ours(from_hugging_face({name: array.numpy() for name, array in state.items()}))
    return model, Sam2(config), params


def relative_error(ours, theirs) -> float:
    """Largest error as a share of the oracle's root mean square."""
    return errors(ours, theirs)[0]


def close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    """Assert the relative error, and print it."""
    error = relative_error(ours, theirs.detach().numpy())
    print(f"relative error {error:.2e}")
    assert error <= tolerance, f"relative error {error:.2e}"
