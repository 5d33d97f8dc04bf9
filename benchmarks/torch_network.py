"""The network of SSS in torch: transformers' SAM-2, a token per class, coarse head, DFE.

Plain modules, for comparisons of speed with ours: coarse head, class tokens and DFE compute what
`sss_jax.models.coarse_head`, `sss_jax.models.sss` and `sss_jax.ssl.dfe` compute. Needs torch and
transformers.

Axes: N images, K classes, Q prompt points, C channels, H W space.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sss_jax.conversion import keymap
from sss_jax.conversion.verify import their_model
from sss_jax.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD
from sss_jax.models.presets import Sam2Config
from sss_jax.ssl.dfe import LEVELS

Maps = Sequence[Tensor]


class Prompts(NamedTuple):
    """Points of K classes on N images: (x, y) in input pixels, and their kinds, -1 for none."""

    points_NKQ2: Tensor
    labels_NKQ: Tensor


class Segmentation(NamedTuple):
    """Class logits with a background of 0 at stride 4, estimated IoU, logit of presence."""

    logits_NLHW: Tensor
    iou_NK: Tensor
    score_NK: Tensor


class CoarseHead(nn.Module):
    """3x3 convolution, normalisation over channels, ReLU, 1x1 convolution to all classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width // 4, 3, padding=1)
        self.norm = nn.LayerNorm(width // 4, eps=1e-6)
        self.classify = nn.Conv2d(width // 4, classes + 1, 1)

    def forward(self, fine_NCHW: Tensor) -> Tensor:
        """Class logits at stride 4, the background first."""
        x = self.norm(self.conv(fine_NCHW).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classify(F.relu(x)).float()


class Segmenter(nn.Module):
    """Student or teacher."""

    def __init__(self, config: Sam2Config, classes: int, attention: str) -> None:
        super().__init__()
        self.sam = their_model(config)
        self.sam.set_attn_implementation(attention)
        self.coarse = CoarseHead(config.width, classes)
        self.class_tokens = nn.Parameter(torch.zeros(classes, config.width))
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def encode(self, image_NHW: Tensor) -> list[Tensor]:
        """Pyramid of intensities in [0, 1], fine to coarse, before the decoder's projections."""
        pixels = (image_NHW[:, None] - self.mean) / self.std
        return list(self.sam.vision_encoder(pixels).fpn_hidden_states)

    def segment(self, maps: Maps, prompts: Prompts) -> Segmentation:
        """Decode all classes of every image in one call."""
        sam, count = self.sam, len(maps[0])
        fine, middle = sam.mask_decoder.conv_s0(maps[0]), sam.mask_decoder.conv_s1(maps[1])
        sparse, dense = sam.prompt_encoder(*prompts, None, None)
        # The class is said by what is added to the padding point.
        sparse = torch.cat([sparse[:, :, :-1], sparse[:, :, -1:] + self.class_tokens[:, None]], 2)
        masks, iou, _, score = sam.mask_decoder(
            image_embeddings=maps[2] + sam.no_memory_embedding.view(1, -1, 1, 1),
            image_positional_embeddings=sam.get_image_wide_positional_embeddings().repeat(
                count, 1, 1, 1
            ),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[fine, middle],
        )
        logits = masks[:, :, 0].float()
        logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
        return Segmentation(logits, iou[..., 0].float(), score[..., 0].float())


class Enhancement(nn.Module):
    """DFE at one level: what changed between two views of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.ReLU()),
            *(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width), nn.ReLU()),
            *(nn.Linear(2 * width, width), nn.LayerNorm(width), nn.ReLU()),
            nn.Linear(width, width),
        )

    def forward(self, weak_NCHW: Tensor, strong_NCHW: Tensor) -> Tensor:
        """Adjusted features of the strong view."""
        a, b = self.conv(weak_NCHW), self.conv(strong_NCHW)
        s = F.cosine_similarity(a.mean((2, 3)), b.mean((2, 3)))[:, None, None, None]
        share = torch.sigmoid(s)
        fused = share * self._per_pixel(a) + (1 - share) * self._per_pixel(b)
        return fused + (1 - s) * (b - a)

    def _per_pixel(self, x_NCHW: Tensor) -> Tensor:
        return self.mlp(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DFE(nn.Module):
    """DFE at all three levels, added to the strong view."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({level: Enhancement(width) for level in LEVELS})

    def forward(self, weak: Maps, strong: Maps) -> list[Tensor]:
        """Enhance one strong view."""
        levels = zip(self.levels.values(), weak, strong, strict=True)
        return [b + enhance(a, b) for enhance, a, b in levels]


def load_segmenter(module: Segmenter, net: Mapping[str, Any]) -> None:
    """Give the network our parameters `net`."""
    state = keymap.to_hugging_face(keymap.to_meta(net["sam2"]))
    module.sam.load_state_dict({name: _tensor(state[name]) for name in module.sam.state_dict()})
    head = net["coarse_head"]
    load_layer(module.coarse.conv, head["conv"])
    load_layer(module.coarse.norm, head["norm"])
    load_layer(module.coarse.classify, head["classify"])
    with torch.no_grad():
        module.class_tokens.copy_(_tensor(net["class_tokens"]))


def load_dfe(module: DFE, params: Mapping[str, Any]) -> None:
    """Give DFE our parameters `dfe`."""
    for name, level in module.levels.items():
        assert isinstance(level, Enhancement)
        load_layer(level.conv, params[name]["conv"])
        for i in range(4):
            load_layer(level.mlp[3 * i], params[name][f"linear_{i}"])
        for i in range(3):
            load_layer(level.mlp[3 * i + 1], params[name][f"norm_{i}"])


def load_layer(module: Any, params: Mapping[str, Any]) -> None:
    """Copy kernel or scale, and bias, into torch's layout."""
    weight = _tensor(params["scale"] if "scale" in params else params["kernel"])
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[weight.ndim]
    with torch.no_grad():
        module.weight.copy_(weight.permute(axes))
        module.bias.copy_(_tensor(params["bias"]))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))
