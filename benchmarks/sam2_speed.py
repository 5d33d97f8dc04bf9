"""SAM-2 beside transformers' (torch), on the same weights, in one process.

    python -m sss_jax.benchmarks.sam2_speed --variants tiny small --size 1024 -o FILE.json

Rows: image encoder, decoder for one box, memory attention with a full bank, one tracked slice, and
forward plus backward of the encoder. Both sides use the same cores or, with `--device cuda`, the
same GPU; calls alternate between the sides, so that a change of load hits both. `--dtype bfloat16`
is `model.dtype` of ours and torch's autocast. transformers attends with SDPA. The GPU's side has
not been tried: none was at hand. Needs torch and transformers.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax import compiling
from sss_jax.benchmarks import ceilings, race, result
from sss_jax.models import memory_bank, tracking
from sss_jax.models.presets import kernels_here
from sss_jax.models.sam2 import Sam2

MEMORIES, POINTERS = 7, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=race.DEVICES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if argv is None:
        race.keep_memory()
    race.share_device(args.device)
    race.keep_compilations()
    best = ceilings.measure(args.dtype)
    print(f"matmul: {best.flops / 1e9:.0f} GFLOP/s", file=sys.stderr)
    facts = {"size": args.size, "device": args.device, "dtype": args.dtype}
    rows = []
    for variant in args.variants:
        for row in measure(variant, args):
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            result.write(args.output, "sam2_speed", rows, settings=facts, ceilings=best.to_json())
    return 0


def measure(variant: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all rows of one variant."""
    size = args.size
    model, ours, params = both_sides(variant, args)
    image = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
    pixels = torch_tensor(image.transpose(0, 3, 1, 2), model)
    call = functools.partial(_jitted, ours, params)
    pairs = {
        "encoder": encoder(call, model, image, pixels),
        "encoder forward and backward": training(ours, params, model, image, pixels),
        "decoder, one box": decoder(call, model, image, pixels),
        "memory attention, 7 memories and 16 pointers": attention(call, ours, model, size),
        "one tracked slice, full bank": tracked(ours, params, model, image, pixels),
    }
    calls = {
        name: (mine, race.torch_call(theirs, args.device, args.dtype))
        for name, (mine, theirs) in pairs.items()
    }
    for name, pair in calls.items():
        yield {"variant": variant, "row": name, **race.race(*pair, args.repeats)}
    if not args.compile:
        return
    # In place, so that the same calls of the other side now run compiled parts.
    for part in ("vision_encoder", "mask_decoder", "memory_attention", "memory_encoder"):
        getattr(model, part).compile()
    for name, pair in calls.items():
        race.free(args.device)
        yield {
            "variant": variant,
            "row": f"{name}, torch.compile",
            **race.race(*pair, args.repeats),
        }


def both_sides(variant: str, args: argparse.Namespace) -> tuple[Any, Sam2, Any]:
    """Return their model and our network with its parameters, on the device."""
    from tests.parity.oracle import video_reference

    model, ours, params = video_reference(variant, args.size)
    config = dataclasses.replace(ours.config, dtype=args.dtype, kernels=kernels_here())
    return model.to(args.device), Sam2(config), jax.device_put(params)


def torch_tensor(x: Any, model: Any) -> Any:
    """Copy an array to the device of a model."""
    import torch

    return torch.tensor(np.ascontiguousarray(x), device=model.device)


def _jitted(ours: Any, params: Any, method: Any, **static: Any) -> Callable:
    apply = compiling.jit(lambda p, *a: ours.apply({"params": p}, *a, method=method, **static))
    return functools.partial(apply, params)


def _no_grad(run: Callable) -> Callable:
    import torch

    def quiet() -> Any:
        with torch.no_grad():
            return run()

    return quiet


def encoder(call: Callable, model: Any, image: Any, pixels: Any) -> tuple[Callable, Callable]:
    """Trunk and pyramid, with the decoder's skip convolutions left to the decoder."""
    encode, x = call("encode_image"), jnp.asarray(image)
    return lambda: encode(x), _no_grad(lambda: model.vision_encoder(pixels))


def training(
    ours: Any, params: Any, model: Any, image: Any, pixels: Any
) -> tuple[Callable, Callable]:
    """Gradient of the squares of all feature maps with respect to all encoder parameters.

    A sum, because a mean over millions of values makes gradients so small that both sides compute
    with denormal numbers.
    """
    import torch

    def loss(p: Any, x: Any) -> Any:
        maps = ours.apply({"params": p}, x, method="encode_image")
        return sum(jnp.square(m).sum() for m in maps)

    grad, x = compiling.jit(jax.grad(loss)), jnp.asarray(image)

    def theirs() -> None:
        with torch.enable_grad():
            model.zero_grad()
            maps = model.vision_encoder(pixels).fpn_hidden_states
            sum(m.square().sum() for m in maps).backward()

    return lambda: grad(params, x), theirs


def decoder(call: Callable, model: Any, image: Any, pixels: Any) -> tuple[Callable, Callable]:
    """One box on encoded features; the skip convolutions are inside ours, so theirs counts them."""
    import torch

    features = call("encode_image")(jnp.asarray(image))
    decode = call("decode")
    size = image.shape[1]
    box = np.array([size / 8, size / 8, size / 2, size / 2], np.float32)
    points, labels = box.reshape(1, 1, 2, 2), np.array([[[2, 3]]], np.int32)
    with torch.no_grad():
        maps = model.vision_encoder(pixels).fpn_hidden_states
    boxes = torch_tensor(box[None, None], model)

    def theirs() -> None:
        skips = [model.mask_decoder.conv_s0(maps[0]), model.mask_decoder.conv_s1(maps[1])]
        model._single_frame_forward(
            input_boxes=boxes, image_embeddings=[*skips, maps[2]], multimask_output=False
        )

    return lambda: decode(features, points, labels), _no_grad(theirs)


def full_bank(ours: Any, grid: int) -> memory_bank.MemoryBank:
    """One prompted slice and six tracked ones before slice 20, and 15 pointers."""
    rng = np.random.default_rng(1)
    config = ours.config
    bank = memory_bank.empty_bank(config, 1, 1, grid * grid, 1)
    yes = jnp.ones((1, 1), bool)

    def draw() -> memory_bank.Memory:
        memory = rng.standard_normal((1, 1, grid * grid, config.memory_width))
        pointer = rng.standard_normal((1, 1, config.width))
        return memory_bank.Memory(jnp.float32(memory), jnp.float32(pointer))

    bank = memory_bank.remember_prompted(bank, config, draw(), jnp.int32(0), yes)
    for index in range(5, 20):
        bank = memory_bank.remember_tracked(bank, config, draw(), jnp.int32(index), yes, yes)
    return bank


def attention(call: Callable, ours: Any, model: Any, size: int) -> tuple[Callable, Callable]:
    """Memory attention alone, on the same keys."""
    import torch

    grid = size // 16
    rng = np.random.default_rng(2)
    coarse = rng.standard_normal((1, grid, grid, 256)).astype(np.float32)
    bank = full_bank(ours, grid)

    def attend(module: Any, coarse: Any, bank: Any) -> Any:
        nothing = jnp.zeros((1, 1, 1, 1))
        features = (nothing, nothing, coarse)
        return module.attend_memory(features, bank, jnp.int32(20), jnp.int32(40), False)[2]

    run = call(attend)
    width = ours.config.memory_width
    keys = MEMORIES * grid * grid + 4 * POINTERS
    memory = torch_tensor(rng.standard_normal((keys, 1, width)).astype(np.float32), model)
    flat = torch_tensor(coarse.reshape(grid * grid, 1, 256), model)
    place = torch.zeros_like(flat)

    def theirs() -> None:
        model.memory_attention(
            current_vision_features=flat,
            current_vision_position_embeddings=place,
            memory=memory,
            memory_posision_embeddings=memory,
            num_object_pointer_tokens=4 * POINTERS,
        )

    return lambda: run(coarse, bank), _no_grad(theirs)


def tracked(
    ours: Any, params: Any, model: Any, image: Any, pixels: Any
) -> tuple[Callable, Callable]:
    """Encoder, memory attention, decoder and memory encoder of one slice of a long volume."""
    import torch
    import transformers

    size, slices = image.shape[1], 24
    grid = size // 16
    bank = full_bank(ours, grid)

    @compiling.jit
    def step(params: Any, image: Any, bank: Any) -> Any:
        features = ours.apply({"params": params}, image, method="encode_image")
        return tracking.track_slice(
            ours, params, bank, features, jnp.int32(20), jnp.int32(slices), jnp.asarray(False)
        )

    video = pixels.expand(slices, -1, -1, -1)
    session = transformers.Sam2VideoInferenceSession(
        video=video,
        video_height=size,
        video_width=size,
        dtype=torch.float32,
        inference_device=model.device,
    )
    session.obj_id_to_idx(0)
    with torch.no_grad():
        _fill(model, session, grid)

    def theirs() -> None:
        session.cache.clear_all()
        session.output_dict_per_obj[0]["non_cond_frame_outputs"].pop(20, None)
        model(session, frame_idx=20)

    return lambda: step(params, image, bank), _no_grad(theirs)


def _fill(model: Any, session: Any, grid: int) -> None:
    """Give the other side the same number of memories and pointers."""
    import torch

    positions = grid * grid
    randn = functools.partial(torch.randn, device=model.device)
    for index in [0, *range(5, 20)]:
        output = {
            "object_pointer": randn(1, 256),
            "maskmem_features": randn(positions, 1, 64),
            "maskmem_pos_enc": randn(positions, 1, 64),
            "pred_masks": torch.zeros(1, 1, 4 * grid, 4 * grid, device=model.device),
            "object_score_logits": torch.ones(1, 1, device=model.device),
        }
        session.store_output(0, index, output_value=output, is_conditioning_frame=index == 0)


if __name__ == "__main__":
    sys.exit(main())
