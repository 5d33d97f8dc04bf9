"""Compare our network with transformers' on the same converted weights.

Needs torch and transformers, which nothing else here does; they are imported inside the functions.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sss_jax.conversion import keymap, sam2
from sss_jax.errors import CheckpointError, ConfigError
from sss_jax.models.presets import Sam2Config, preset

SIZE = 256
TOLERANCE = 1e-4
"""Largest error over the root mean square of an output; float32 rounding stays below 2e-5."""

_PACKAGES = ("torch", "transformers")

Outputs = dict[str, np.ndarray]


def require_packages() -> None:
    """Raise `ConfigError` unless the independent implementation can be imported."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--verify compares with transformers' SAM-2, but {' and '.join(missing)} cannot be "
            "imported here: pip install torch transformers, or leave --verify out"
        )


def verify(folder: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run both networks on the converted weights and compare what they put out.

    Args:
        folder: converted weights.
        report: receives the table, a line per output.

    Returns:
        One row per output: its name and its relative error.

    Raises:
        ConfigError: a package is missing.
        CheckpointError: the folder is damaged, or an output differs by more than `TOLERANCE`.
    """
    require_packages()
    info, params = sam2.load(folder)
    generator = np.random.default_rng(0)
    image = generator.standard_normal((1, SIZE, SIZE, 3)).astype(np.float32)
    box = np.array([[[40, 56, 168, 200], [8, 100, 120, 244]]], np.float32)
    config = preset(info.variant, SIZE, version=info.version)
    theirs = _their_outputs(config, keymap.to_meta(params), image, box)
    ours = _our_outputs(config, params, image, box)
    largest = {name: errors(ours[name], theirs[name])[0] for name in theirs}
    for name, error in largest.items():
        report(f"{name:<20} {error:.1e}")
    wrong = [name for name, error in largest.items() if not error <= TOLERANCE]  # also NaN
    if wrong:
        raise CheckpointError(
            f"{folder}: with these weights our network differs from transformers' by more than "
            f"{TOLERANCE:g} in {', '.join(wrong)}; do not use them, and please report it"
        )
    return [{"output": name, "relative_error": error} for name, error in largest.items()]


def errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Largest and root mean square error, as shares of the root mean square of `theirs`.

    Infinite where the shapes differ.
    """
    if ours.shape != theirs.shape:
        return float("inf"), float("inf")
    scale = max(_root_mean_square(theirs), float(np.finfo(np.float32).tiny))
    error = np.asarray(ours, np.float64) - theirs
    return float(np.abs(error).max()) / scale, _root_mean_square(error) / scale


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _our_outputs(
    config: Sam2Config, params: Mapping[str, Any], image: np.ndarray, box: np.ndarray
) -> Outputs:
    import jax

    from sss_jax.models.sam2 import Sam2

    network = Sam2(config)
    corners = box.reshape(*box.shape[:2], 2, 2)
    labels = np.broadcast_to(np.array([2, 3], np.int32), corners.shape[:3])

    @jax.jit
    def outputs(params: Any) -> tuple[Any, Any]:
        features = network.apply({"params": params}, image, method="encode_image")
        decoded = network.apply({"params": params}, features, corners, labels, method="decode")
        return features, decoded

    with jax.default_matmul_precision("highest"):
        features, decoded = jax.device_get(outputs(params))
    return {
        **{f"features {i}": level for i, level in enumerate(features)},
        "mask logits": decoded.logits_BKMHW,
        "estimated IoU": decoded.iou_BKM,
        "object score": decoded.object_score_BK,
    }


def _their_outputs(
    config: Sam2Config, tensors: Mapping[str, np.ndarray], image: np.ndarray, box: np.ndarray
) -> Outputs:
    import torch

    model = their_model(config)
    state = keymap.to_hugging_face(tensors)
    model.load_state_dict({name: torch.tensor(state[name]) for name in model.state_dict()})
    inputs = {
        "pixel_values": torch.tensor(np.ascontiguousarray(image.transpose(0, 3, 1, 2))),
        "input_boxes": torch.tensor(box),
    }
    with torch.no_grad():
        levels = model.vision_encoder(inputs["pixel_values"]).fpn_hidden_states
        # The single mask and the candidates come from two calls there, in one array here.
        single, multi = (model(**inputs, multimask_output=many) for many in (False, True))
    return {
        **{f"features {i}": level.permute(0, 2, 3, 1).numpy() for i, level in enumerate(levels)},
        "mask logits": torch.cat([single.pred_masks, multi.pred_masks], 2).numpy(),
        "estimated IoU": torch.cat([single.iou_scores, multi.iou_scores], 2).numpy(),
        "object score": multi.object_score_logits[..., 0].numpy(),
    }


def vision_config(config: Sam2Config) -> Any:
    """Transformers' description of our image encoder."""
    import transformers

    size, widths = config.image_size, [config.embed_dim * 2**i for i in range(4)]
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.heads,
        image_size=[size, size],
        window_positional_embedding_background_size=[config.pos_table] * 2,
        blocks_per_stage=list(config.depths),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[config.heads * 2**i for i in range(4)],
        window_size_per_stage=list(config.windows),
        global_attention_blocks=list(config.global_blocks),
    )
    return transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[size // stride] * 2 for stride in config.strides],
    )


def their_model(config: Sam2Config) -> Any:
    """Transformers' `Sam2Model` in the shape of ours, with weights of its own."""
    import transformers

    whole = transformers.Sam2Config(
        vision_config=vision_config(config),
        prompt_encoder_config={"image_size": config.image_size},
        mask_decoder_config={"dynamic_multimask_via_stability": False},
    )
    return transformers.Sam2Model(whole).eval()
