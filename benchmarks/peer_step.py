"""Training steps beside plain torch on transformers' SAM-2, in one process, calls in turn.

    python -m sss_jax.benchmarks.peer_step --preset tiny --size 256 -o FILE.json

Two steps: `fine-tuning` (encoder, decoder with boxes and points, cross-entropy and Dice, AdamW) and
`semi-supervised` (SSS without memory: teacher, two strong views, DFE at all levels, PCSW, the
same losses, AdamW, moving average). Ours is the step that training runs, with a donated state; the
other is `torch_step`, which reads the same settings and starts from the same parameters. Every row
holds the operations that each side asks for and the number of images that torch encodes and
decodes, which are ours too. Torch runs with eager attention, with SDPA, and with `--compile`
with SDPA and compiled modules. `--dtype bfloat16` is torch's autocast, and `model.dtype` of ours.

Differs: our step also moves a teacher while it fine-tunes, and refuses updates that are not finite;
theirs decodes labelled images and each strong view in calls of their own, and projects the weak
view in DFE once for each strong view, as the published sketch does.

With `--device cuda` both sides share the GPU, and float32 products may run as TF32 on both. That
has not been tried: no GPU was at hand. Needs torch and transformers.
"""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sss_jax import flops
from sss_jax.axes import PyTree
from sss_jax.benchmarks import race, result
from sss_jax.benchmarks.batches import synthetic_batch
from sss_jax.options import (
    DataOptions,
    DFEOptions,
    MemoryOptions,
    ModelOptions,
    Options,
    SemiOptions,
    TrainOptions,
)
from sss_jax.train.mesh import batch_fields, make_driver
from sss_jax.train.setup import Setup, set_up
from sss_jax.train.state import init_all_params, state_of
from sss_jax.train.step import make_train_step, root_key

STEPS = ("fine-tuning", "semi-supervised")
WARM_UP = 2
"""Calls of ours before it is timed: the second still takes fresh memory, for the first state."""
DECIDED = 40.0
"""Factor of the coarse head's last kernel: random weights then decide, so PCSW has masks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    args = _parser().parse_args(argv)
    if argv is None:
        race.keep_memory()
    race.share_device(args.device)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    settings["float32_products"] = "TF32 where the GPU has it" if args.device == "cuda" else "full"
    rows = []
    for name in args.steps:
        for row in measure(name, args):
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            result.write(args.output, "peer_step", rows, settings=settings)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=race.DEVICES, default="cpu")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--clips", type=int, default=1, help="clips of each stream")
    parser.add_argument("--slices", type=int, default=4, help="slices of a clip")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


def options_of(name: str, args: argparse.Namespace) -> Options:
    """Return our settings of a step; whatever is not named here has its default.

    Fine-tuning takes the slices of the labelled clips one by one.
    """
    semi = name == "semi-supervised"
    clips, slices = (args.clips, args.slices) if semi else (args.clips * args.slices, 1)
    return Options(
        model=ModelOptions(args.preset, args.size, args.classes, args.dtype),
        data=DataOptions(clip_slices=slices),
        memory=MemoryOptions(kind="none"),
        dfe=paper_dfe(semi),
        semi=SemiOptions(enabled=semi, labelled_prompts="gt_box", unlabelled_dice=True),
        train=TrainOptions(labelled_batch=clips, unlabelled_batch=clips),
    )


def paper_dfe(enabled: bool) -> DFEOptions:
    """DFE as the paper and torch's step have it, so that both sides do the same work."""
    # The other side keeps its projections too.
    return DFEOptions(enabled=enabled, pair="weak_strong", level_4=True, remat=False)


class Ours:
    """Our step with its state; a call trains on the batch and waits."""

    def __init__(self, setup: Setup, options: Options, device: jax.Device) -> None:
        self.gflop = count(setup, options)
        driver = make_driver(setup.model, options, setup.optimizer, setup.state, [device])
        self.params = draw_params(setup, options)
        self.batch = synthetic_batch(options)
        state = driver.place_state(state_of(self.params, setup.optimizer, setup.memory))
        key = driver.place_key(root_key(0))
        began = time.monotonic()
        batch = driver.place_batch(self.batch)
        self._step = driver.step.lower(state, batch, key).compile()
        self.compile_s = round(time.monotonic() - began, 1)
        self.temporary_bytes = self._step.memory_analysis().temp_size_in_bytes
        self._state, self._rest, self.metrics = state, (batch, key), {}

    def __call__(self) -> None:
        """Take one step."""
        self._state, self.metrics = self._step(self._state, *self._rest)
        jax.block_until_ready((self._state, self.metrics))


def draw_params(setup: Setup, options: Options) -> PyTree:
    """Draw parameters, on the host, whose coarse masks are not empty."""
    params = jax.device_get(init_all_params(setup.model, options, root_key(0)))
    last = params["net"]["coarse_head"]["classify"]
    last["kernel"] = last["kernel"] * np.float32(DECIDED)
    return params


def count(setup: Setup, options: Options) -> float:
    """Count the operations of our step, 10^9."""
    step = make_train_step(setup.model, options, setup.optimizer)
    key = jax.eval_shape(lambda: root_key(0))
    return round(flops.count(step, setup.state, batch_fields(options), key) / 1e9, 1)


def measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Race our step against every variant of theirs."""
    options = options_of(name, args)
    setup = set_up(options)
    ours = Ours(setup, options, jax.devices()[0])
    for _ in range(WARM_UP):
        ours()
    build = functools.partial(
        their_step, setup.model.config, options, ours.params, ours.batch, args.device
    )
    work = count_theirs(*build("eager"))
    facts = {"step": name, "ours_gflop": ours.gflop, **work, "compile_s": ours.compile_s}
    variants = ["eager", "sdpa", *(["sdpa, torch.compile"] if args.compile else [])]
    for variant in variants:
        race.free(args.device)
        yield {**facts, "torch": variant, **_row(ours, build, variant, args)}
    slices = sum(part["slice_mask"].size for part in ours.batch.values())
    print(f"{name}: {slices} slices a step, {ours.metrics}", file=sys.stderr)


def _row(ours: Ours, build: Callable, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Race one variant; a variant that does not run leaves its error."""
    trainer, batch = build(variant.split(",")[0])
    if "compile" in variant:
        trainer.compile_parts()
    theirs = race.torch_call(lambda: trainer.step(batch), args.device)
    try:
        first = result.seconds(theirs, 1, 0)[0]
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"[:500]}
    memory = _memory(ours, theirs, args.device)
    times = race.alternate(ours, theirs, args.repeats)
    return {**times, "torch_first_call_s": round(first, 1), **memory}


def their_step(
    config: Any, options: Options, params: PyTree, batch: PyTree, device: str, attention: str
) -> tuple[Any, Any]:
    """Torch's step with our parameters, and our batch as it wants it."""
    from sss_jax.benchmarks import torch_step

    trainer = torch_step.TorchStep(config, options, params, device, attention)
    return trainer, torch_step.as_tensors(batch, device)


def count_theirs(trainer: Any, batch: Any) -> dict[str, Any]:
    """Operations of a step, and images that pass encoder and decoder (an image counts per class).

    Counted with eager attention, whose products the counter knows on every device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    seen = {"images_encoded": 0, "masks_decoded": 0}
    with FlopCounterMode(display=False) as counter, _counting(trainer, seen):
        trainer.step(batch)
    return {"torch_gflop": round(counter.get_total_flops() / 1e9, 1), **seen}


@contextlib.contextmanager
def _counting(trainer: Any, seen: dict[str, int]) -> Iterator[None]:
    def encoder(module: Any, args: Any, output: Any) -> None:
        seen["images_encoded"] += len(args[0])

    def decoder(module: Any, args: Any, output: Any) -> None:
        seen["masks_decoded"] += output[0].shape[0] * output[0].shape[1]

    hooks = []
    for network in trainer.networks():
        hooks.append(network.sam.vision_encoder.register_forward_hook(encoder))
        hooks.append(network.sam.mask_decoder.register_forward_hook(decoder))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _memory(ours: Ours, theirs: Callable, device: str) -> dict[str, int]:
    """Bytes that a step takes for itself: ours by XLA's plan, theirs by the GPU's allocator.

    On a CPU theirs is not known: what it frees stays with the process, more or less.
    """
    found = {"ours_temporary_bytes": ours.temporary_bytes}
    theirs()
    if device == "cpu":
        return found
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    theirs()
    return {**found, "torch_temporary_bytes": torch.cuda.max_memory_allocated() - before}


if __name__ == "__main__":
    sys.exit(main())
