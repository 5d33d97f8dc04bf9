"""Two training steps in plain torch on transformers' SAM-2, for comparisons of speed with ours.

`TorchStep` is a SAM-2 fine-tuning step where `semi.enabled` is false, and otherwise one step of SSS
with two strong views, written as its published sketch describes it: the teacher's features of the
weak view, complementary dropout, DFE with the weak side computed for each strong view, coarse masks
searched by scipy on the host, decoder, losses, AdamW, moving average. Both read our settings
and start from our parameters. Needs torch and transformers; eager unless `compile_parts` is called.

Axes: B clips, S slices, H W pixels; after `flatten(0, 1)` N = B x S images.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sss_jax.benchmarks import torch_losses, torch_prompts, torch_views
from sss_jax.benchmarks.torch_network import (
    DFE,
    Prompts,
    Segmenter,
    load_dfe,
    load_segmenter,
)
from sss_jax.models.presets import Sam2Config
from sss_jax.options import Options

Batch = Mapping[str, Mapping[str, Tensor]]


class Strong(NamedTuple):
    """A strong view and what it learns from; all of it is pasted along the view's box."""

    image_BSHW: Tensor
    box_B4: Tensor


class TorchStep:
    """A network with its teacher and optimizer; `step` trains it on one batch.

    Args:
        config: shape of SAM-2.
        options: our settings; memory is not implemented.
        params: our parameters, `{"net": ..., "dfe": ...}`.
        device: where everything lies.
        attention: transformers' attention implementation.
    """

    def __init__(
        self,
        config: Sam2Config,
        options: Options,
        params: Mapping[str, Any],
        device: str = "cpu",
        attention: str = "eager",
    ) -> None:
        assert options.memory.kind == "none"
        self.options, self.stride = options, config.strides[0]
        self.classes, self.done = options.model.num_classes, 0
        self.low = config.dtype == "bfloat16"
        self.student = Segmenter(config, self.classes, attention)
        load_segmenter(self.student, params["net"])
        self.student.to(device).train()
        self.dfe: DFE | None = None
        if options.semi.enabled:
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.dfe = DFE(config.width).to(device)
            load_dfe(self.dfe, params["dfe"])
        self.generator = torch.Generator(device).manual_seed(0)
        self.device = torch.device(device)
        self.optimizer = torch.optim.AdamW(self._groups(), fused=True)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(
            self.optimizer, options.train.steps, options.optimizer.power
        )

    def step(self, batch: Batch) -> Tensor:
        """Train on one batch and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.options.optimizer.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.options.semi.enabled:
            self._follow()
        self.done += 1
        return loss.detach()

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that is trained."""
        return [p for module in self._modules() for p in module.parameters() if p.requires_grad]

    def compile_parts(self) -> None:
        """Compile the modules in place; the host search stays between them."""
        for network in self.networks():
            for part in (network.sam.vision_encoder, network.sam.mask_decoder, network.coarse):
                part.compile()
        if self.dfe is not None:
            self.dfe.compile()

    def networks(self) -> list[Segmenter]:
        """Return the student and, where there is one, the teacher."""
        return [self.student, *([self.teacher] if self.options.semi.enabled else [])]

    def loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch."""
        options, labelled = self.options, batch["labelled"]
        image, label, valid = torch_views.weak_view(
            labelled["image"], labelled["label"], options.weak, self.generator
        )
        assert label is not None
        truth = torch_prompts.shrink(label, self.stride, self.classes)
        prompts = torch_prompts.search(truth, self.stride, options.semi.box_jitter)
        label, valid = label.flatten(0, 1), valid.flatten(0, 1)
        if not options.semi.enabled:
            with self._precision():
                maps = self.student.encode(image.flatten(0, 1))
            return self._labelled_loss(maps, prompts, label, valid)
        weak, _, inside = torch_views.weak_view(
            batch["unlabelled"]["image"], None, options.weak, self.generator
        )
        views = [Strong(*torch_views.strong_view(weak, options.strong, self.generator))]
        views += [Strong(*torch_views.strong_view(weak, options.strong, self.generator))]
        images = [image, *(view.image_BSHW for view in views)]
        with self._precision():
            maps = self.student.encode(torch.cat([x.flatten(0, 1) for x in images]))
        sizes = [x.shape[0] * x.shape[1] for x in images]
        own, *strong = zip(*(level.split(sizes) for level in maps), strict=True)
        loss = self._labelled_loss(own, prompts, label, valid)
        return loss + options.semi.weight * self._unlabelled_loss(weak, inside, views, strong)

    def _labelled_loss(self, maps: Any, prompts: Prompts, label: Tensor, valid: Tensor) -> Tensor:
        weights = self.options.loss
        with self._precision():
            output = self.student.segment(maps, prompts)
            coarse = self.student.coarse(maps[0])
        return (
            torch_losses.supervised(output.logits_NLHW, label, valid, weights)
            + weights.coarse * torch_losses.supervised(coarse, label, valid, weights)
            + weights.iou * torch_losses.iou(output, label, valid)
            + weights.presence * torch_losses.presence(output, label, valid)
        )

    def _unlabelled_loss(
        self, weak: Tensor, inside: Tensor, views: list[Strong], strong: list[Any]
    ) -> Tensor:
        """Average the consistency loss over the strong views."""
        options, slices = self.options, weak.shape[1]
        maps, coarse, label, confidence = self._teach(weak)
        strong, total = self._drop_channels(strong, slices), torch.zeros((), device=self.device)
        for view, own in zip(views, strong, strict=True):

            def pasted(x_N: Tensor, box: Tensor = view.box_B4) -> Tensor:
                clips = x_N.unflatten(0, (-1, slices))
                return torch_views.paste(clips, box).flatten(0, 1)

            with self._precision():
                assert self.dfe is not None
                seen = self.dfe([pasted(x) for x in maps], own)
                prompts = self._prompts(pasted(coarse), slices)
                output = self.student.segment(seen, prompts)
            total = total + torch_losses.unlabelled(
                output.logits_NLHW,
                *(pasted(x) for x in (label, confidence, inside.flatten(0, 1))),
                tau=options.semi.confidence,
                smooth=options.loss.smooth,
            )
        return total / len(views)

    @torch.no_grad()
    def _teach(self, weak: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Features, coarse probabilities, pseudo-labels and confidence of the weak view."""
        image_NHW = weak.flatten(0, 1)
        with self._precision():
            maps = self.teacher.encode(image_NHW)
            coarse = self.teacher.coarse(maps[0]).softmax(1)[:, 1:]
            output = self.teacher.segment(maps, self._prompts(coarse, weak.shape[1]))
        share = torch_losses.upsample(output.logits_NLHW, image_NHW).softmax(1)
        confidence, label = share.max(1)
        return maps, coarse, label, confidence

    def _prompts(self, coarse_NKhw: Tensor, slices: int) -> Prompts:
        mask = coarse_NKhw > self.options.pcsw.threshold
        return torch_prompts.search(mask.unflatten(0, (-1, slices)), self.stride)

    def _drop_channels(self, strong: list[Any], slices: int) -> list[list[Tensor]]:
        """Give each view the channels that the other one loses; half of the clips keep all."""
        if not self.options.semi.dropout:
            return strong
        batch = strong[0][0].shape[0] // slices
        order = torch.randperm(batch, generator=self.generator, device=self.device)
        keeps_B1 = (order < batch // 2)[:, None]
        views: list[list[Tensor]] = [[], []]
        for pair in zip(*strong, strict=True):
            size = (batch, pair[0].shape[1])
            drawn = torch.rand(size, generator=self.generator, device=self.device) < 0.5
            factor = torch.where(keeps_B1, 1.0, torch.where(drawn, 2.0, 0.0))
            for view, x, own in zip(views, pair, (factor, 2 - factor), strict=True):
                view.append(x * own.repeat_interleave(slices, 0)[:, :, None, None].to(x.dtype))
        return views

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the teacher towards the student."""
        decay = min(1 - 1 / (self.done + 1), self.options.semi.ema_decay)
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for old, new in pairs:
            old.lerp_(new, 1 - decay)

    def _modules(self) -> Iterator[nn.Module]:
        yield self.student
        if self.dfe is not None:
            yield self.dfe

    def _groups(self) -> list[dict[str, Any]]:
        """Encoder and the rest, with weight decay on matrices and kernels and without."""
        options = self.options.optimizer
        encoder = {id(p) for p in self.student.sam.vision_encoder.parameters()}
        kernels = {
            id(layer.weight)
            for module in self._modules()
            for layer in module.modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in self.parameters():
            rate = options.encoder_rate if id(p) in encoder else options.rate
            decay = options.weight_decay if id(p) in kernels else 0.0
            groups.setdefault((rate, decay), []).append(p)
        return [{"params": ps, "lr": r, "weight_decay": d} for (r, d), ps in groups.items()]

    def _precision(self) -> contextlib.AbstractContextManager:
        if not self.low:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def as_tensors(batch: Mapping[str, Mapping[str, Any]], device: str) -> Batch:
    """Bring images [B, S, H, W, 1] and labels of our batches to the device, without channel."""
    return {
        stream: {
            name: torch.from_numpy(x[..., 0] if name == "image" else x.astype("int64")).to(device)
            for name, x in clips.items()
            if name in ("image", "label")
        }
        for stream, clips in batch.items()
    }
