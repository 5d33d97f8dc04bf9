"""SAM-2's image encoder beside that of jax-ml/bonsai, in one process, float32, calls in turn.

    git clone https://github.com/jax-ml/bonsai
    FLAX_PYTREE_MODULE=false PYTHONPATH=bonsai python -m sss_jax.benchmarks.bonsai_speed -o FILE

Rows: the encoder, and its forward and backward pass. Their modules keep lists of layers, which Flax
0.12 refuses unless the variable is set. Both sides are jitted: ours with the compiler options that
it always has (`compiling.jit`), theirs as it stands. Their features are not SAM-2's (tanh GELU,
heads merged in another order, other positions), so only time and operations are compared; the rest
of their SAM-2 has no training and its memory does not run.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax import compiling, flops
from sss_jax.benchmarks import race, result
from sss_jax.models.presets import Sam2Config, preset
from sss_jax.models.sam2 import Sam2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if argv is None:
        race.keep_memory()
    rows = []
    for variant in args.variants:
        for row in measure(preset(variant, args.size, memory=False), args.repeats):
            rows.append({"variant": variant, **row})
            print(rows[-1], file=sys.stderr, flush=True)
    result.write(args.output, "bonsai_speed", rows, size=args.size)
    print(render(rows))
    return 0


def measure(config: Sam2Config, repeats: int) -> Iterator[dict[str, Any]]:
    """Time both rows of one network."""
    side = config.image_size
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, side, side, 3)), jnp.float32)
    sides = our_encoder(config, image), their_encoder(config)
    rows = {"encoder": lambda run: run, "encoder forward and backward": _gradient}
    for name, change in rows.items():
        (ours, params), (theirs, state) = ((change(run), values) for run, values in sides)
        calls = [
            functools.partial(compiling.jit(ours), params, image),
            functools.partial(jax.jit(theirs), state, image),
        ]
        waits = [functools.partial(race.waiting, call) for call in calls]
        for wait in waits:
            wait()
        yield {
            "row": name,
            "ours_gflop": round(flops.count(ours, params, image) / 1e9, 1),
            "bonsai_gflop": round(flops.count(theirs, state, image) / 1e9, 1),
            **race.alternate(*waits, repeats, other="bonsai"),
        }


def our_encoder(config: Sam2Config, image: jax.Array) -> tuple[Callable, Any]:
    """Return our encoder as a function of parameters and image, and random parameters."""
    network = Sam2(config)
    params = jax.jit(functools.partial(network.init, method="encode_image"))(
        jax.random.key(0), image
    )
    return lambda p, x: network.apply(p, x, method="encode_image"), params


def their_encoder(config: Sam2Config) -> tuple[Callable, Any]:
    """Return bonsai's encoder of the same shape, likewise.

    Raises:
        SystemExit: it cannot be imported, or Flax refuses it.
    """
    try:
        from bonsai.models.sam2 import model_image_encoder as encoder
        from bonsai.models.sam2 import model_positional_encoding as position
        from bonsai.models.sam2.model_hiera_det import Hiera
    except ImportError as error:
        raise SystemExit(
            f"bonsai_speed: {error}; put a checkout of jax-ml/bonsai on PYTHONPATH"
        ) from None
    from flax import nnx

    rngs = nnx.Rngs(0)
    try:
        trunk = Hiera(
            config.embed_dim,
            config.heads,
            stages=config.depths,
            window_spec=config.windows,
            global_att_blocks=config.global_blocks,
            window_pos_embed_bkg_spatial_size=(config.pos_table,) * 2,
            rngs=rngs,
        )
        neck = encoder.FPNNeck(
            position.PositionEmbeddingSine(256),
            config.width,
            trunk.channel_list,
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
            rngs=rngs,
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"bonsai_speed: {reason}; set FLAX_PYTREE_MODULE=false") from None
    graph, state = nnx.split(encoder.ImageEncoder(trunk, neck, scalp=1))
    return lambda s, x: nnx.merge(graph, s)(x)["backbone_fpn"], state


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| variant | row | GFLOP, ours / bonsai | ours, s | bonsai, s | speed-up |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        work = f"{row['ours_gflop']:.0f} / {row['bonsai_gflop']:.0f}"
        times = [f"{row[f'{side}_s']['median']:.2f}" for side in ("ours", "bonsai")]
        cells = [row["variant"], row["row"], work, *times, f"{row['speedup']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gradient(run: Callable) -> Callable:
    """Gradient in the parameters of the sum of squares of all maps."""
    return jax.grad(lambda params, x: sum(jnp.square(m).sum() for m in run(params, x)))


if __name__ == "__main__":
    sys.exit(main())
