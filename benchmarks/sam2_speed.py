"""SAM-2 beside transformers' (torch), on the same weights, in one process, float32.

    python -m sss_jax.benchmarks.sam2_speed --variants tiny small --size 1024 -o FILE.json

Rows: image encoder, decoder for one box, memory attention with a full bank, one tracked slice, and
forward plus backward of the encoder. Both sides use the same cores; calls alternate between the
sides, so that a change of load hits both. Needs torch and transformers.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax import compiling
from sss_jax.benchmarks import race, result
from sss_jax.benchmarks.ceilings import matmul_rate
from sss_jax.models import memory_bank, tracking

MEMORIES, POINTERS = 7, 16


def main() -> int:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    race.keep_compilations()
    rate = matmul_rate()
    print(f"matmul: {rate / 1e9:.0f} GFLOP/s", file=sys.stderr)
    rows = []
    for variant in args.variants:
        for row in measure(variant, args.size, args.repeats, args.compile):
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    result.write(args.output, "sam2_speed", rows, matmul_flops_per_s=rate, size=args.size)
    return 0


def measure(variant: str, size: int, repeats: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """Time all rows of one variant."""
    import torch

    from tests.parity.oracle import video_reference

    model, ours, params = video_reference(variant, size)
    params = jax.device_put(params)
    image = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
    pixels = torch.tensor(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    call = functools.partial(_jitted, ours, params)
    pairs = {
        "encoder": encoder(call, model, image, pixels),
        "encoder forward and backward": training(ours, params, model, image, pixels),
        "decoder, one box": decoder(call, model, image, pixels),
        "memory attention, 7 memories and 16 pointers": attention(call, ours, model, size),
        "one tracked slice, full bank": tracked(ours, params, model, image, pixels),
    }
    for name, pair in pairs.items():
        yield {"variant": variant, "row": name, **race.race(*pair, repeats)}
    if not compiled:
        return
    # In place, so that the same calls of the other side now run compiled parts.
    for part in ("vision_encoder", "mask_decoder", "memory_attention", "memory_encoder"):
        getattr(model, part).compile()
    for name, pair in pairs.items():
        yield {"variant": variant, "row": f"{name}, torch.compile", **race.race(*pair, repeats)}


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
    boxes = torch.tensor(box)[None, None]

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
    memory = torch.tensor(rng.standard_normal((keys, 1, width)), dtype=torch.float32)
    flat = torch.tensor(coarse.reshape(grid * grid, 1, 256))
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
        video=video, video_height=size, video_width=size, dtype=torch.float32
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
    for index in [0, *range(5, 20)]:
        output = {
            "object_pointer": torch.randn(1, 256),
            "maskmem_features": torch.randn(positions, 1, 64),
            "maskmem_pos_enc": torch.randn(positions, 1, 64),
            "pred_masks": torch.zeros(1, 1, 4 * grid, 4 * grid),
            "object_score_logits": torch.ones(1, 1),
        }
        session.store_output(0, index, output_value=output, is_conditioning_frame=index == 0)


if __name__ == "__main__":
    sys.exit(main())
