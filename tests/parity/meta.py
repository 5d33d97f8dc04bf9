"""The oracle that decides: Meta's own code, with Meta's own configuration files.

PyPI's `sam2` 1.1.0 is facebookresearch/sam2 as it is; it runs on a CPU without torchvision:
`pip install torch==2.13.0 hydra-core iopath tqdm pillow`, then
`SAM2_BUILD_CUDA=0 pip install --no-deps --no-build-isolation sam2==1.1.0`.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from sam2 import build_sam, sam2_video_predictor

_LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def predictor(config, weights=None, more=()):
    """Meta's video predictor of a published size, at the size of `config`'s images.

    Args:
        config: one of our presets.
        weights: arrays by official name; None: random ones of Meta's.
        more: further overrides of the configuration file.
    """
    family = "sam2" if config.version == "2.0" else f"sam{config.version}"
    file = f"configs/{family}/{family}_hiera_{_LETTERS[config.name]}.yaml"
    more = [f"++model.image_size={config.image_size}", *more]
    model = build_sam.build_sam2_video_predictor(file, device="cpu", hydra_overrides_extra=more)
    model.fill_hole_area = 0  # a CUDA kernel, which a CPU leaves out with a warning
    if weights is not None:
        state = {name: torch.from_numpy(array) for name, array in weights.items()}
        model.load_state_dict(state, strict=True)
    return model


def pixels(image_BHWC):
    """Images as torch wants them."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image_BHWC, -1, 1)))


def channels_last(tensor):
    """Undo `pixels`."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


@contextlib.contextmanager
def float32_memory():
    """Let the predictor keep its memories in float32; it stores them in bfloat16."""
    with mock.patch.object(torch, "bfloat16", torch.float32):
        yield


def start(model, video_SHWC):
    """State of the predictor for standardised frames, without its reader of files."""
    size = model.image_size
    loaded = pixels(video_SHWC), size, size
    with mock.patch.object(sam2_video_predictor, "load_video_frames", return_value=loaded):
        return model.init_state("")


def propagate(model, state, **options):
    """Track to one end of the video; the results are in `state`."""
    with mock.patch.object(sam2_video_predictor, "tqdm", lambda frames, **_: frames):
        for _ in model.propagate_in_video(state, **options):
            pass


def kept(state, k, t):
    """What the predictor holds of object k on frame t."""
    outputs = state["output_dict_per_obj"][k]
    found = outputs["cond_frame_outputs"].get(t)
    return outputs["non_cond_frame_outputs"][t] if found is None else found
