"""PCSW beside scipy.ndimage: `python -m sss_jax.benchmarks.pcsw_cost -o FILE.json`.

Both sides turn the same binary volumes into prompts. scipy labels every window in turn until one is
accepted, as the published sketch does it on the host; ours runs inside jit on the device at hand.
Every prompt of every volume must agree, or nothing is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sss_jax.benchmarks import result
from sss_jax.metrics.boxes import tight_box
from sss_jax.options import PCSWOptions
from sss_jax.ssl.pcsw import SlicePrompts, search_prompts

KINDS = ("object", "object and specks", "many blobs", "noise", "empty")
Found = tuple[int, bool, tuple[int, ...]]
"""Prompt slice, whether a window was accepted, inclusive box (x0, y0, x1, y1)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Time both sides on every kind of mask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="side of the masks, pixels")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    shape = (args.slices, args.size, args.size)
    search = jax.jit(jax.vmap(lambda mask: search_prompts(mask, shape[0], PCSWOptions())))
    rows = []
    for kind in KINDS:
        masks_KSHW = np.stack([make_mask(kind, seed, shape) for seed in range(args.classes)])
        rows.append(compare(kind, masks_KSHW, search, args.repeats))
        print(rows[-1], file=sys.stderr, flush=True)
    settings = {"slices": args.slices, "size": args.size, "classes": args.classes}
    result.write(args.output, "pcsw_cost", rows, settings=settings)
    return 0


def compare(kind: str, masks_KSHW: NDArray[np.bool_], search: Any, repeats: int) -> dict[str, Any]:
    """Time one kind of mask, after both sides gave the same prompts."""
    placed = jnp.asarray(masks_KSHW)
    expected = [with_scipy(mask) for mask in masks_KSHW]
    found = as_found(jax.device_get(search(placed)))
    if found != expected:
        raise SystemExit(f"{kind}: prompts differ: {found} and with scipy {expected}")
    ours = result.seconds(lambda: jax.block_until_ready(search(placed)), repeats)
    theirs = result.seconds(lambda: [with_scipy(m) for m in masks_KSHW], repeats, warm_up=1)
    ratio = result.summary(theirs)["median"] / result.summary(ours)["median"]
    return {
        "masks": kind,
        "foreground": round(float(masks_KSHW.mean()), 4),
        "ours_s": result.summary(ours),
        "scipy_s": result.summary(theirs),
        "speedup": round(ratio, 2),
    }


def make_mask(kind: str, seed: int, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Draw a volume of one kind: what a trained network, and an untrained one, might find."""
    rng = np.random.default_rng(seed)
    if kind == "empty":
        return np.zeros(shape, bool)
    if kind == "noise":
        return rng.random(shape) < 0.3
    if kind == "many blobs":
        smooth = ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), (1, 5, 5))
        return smooth > np.quantile(smooth, 0.85)
    axes = np.indices(shape, np.float32)
    centre = np.array(shape) * rng.uniform(0.4, 0.6, 3)
    radius = np.array(shape) * rng.uniform(0.15, 0.35, 3)
    scaled = (axes - centre[:, None, None, None]) / radius[:, None, None, None]
    ball = np.square(scaled).sum(axis=0) < 1
    return ball if kind == "object" else ball | (rng.random(shape) < 0.001)


def with_scipy(mask_SHW: NDArray[np.bool_]) -> Found:
    """Prompt slice, acceptance and box, window by window on the host; one slice is a window."""
    slices, tau = len(mask_SHW), PCSWOptions().tau
    shortest, longest = (max(2, slices // 3), max(3, slices // 2)) if slices > 1 else (1, 1)
    for length in range((shortest + longest) // 2, longest + 1):
        for start in range(slices - length + 1):
            window = mask_SHW[start : start + length]
            label, count = ndimage.label(window)
            if not count:
                continue
            sizes = np.bincount(label.ravel())[1:]
            if sizes.max() >= tau * window.sum():
                component = label == 1 + sizes.argmax()
                best = int(component.sum(axis=(1, 2)).argmax())
                return start + best, True, _tight(component[best])
    best = int(mask_SHW.sum(axis=(1, 2)).argmax())
    return best, False, _tight(mask_SHW[best])


def _tight(plane_HW: NDArray[np.bool_]) -> tuple[int, ...]:
    box = tight_box(plane_HW)
    if box is None:
        return (0, 0, plane_HW.shape[1] - 1, plane_HW.shape[0] - 1)
    return tuple(int(v) for v in box)


def as_found(prompts: SlicePrompts) -> list[Found]:
    """Read our results in the form of `with_scipy`."""
    return [
        (int(at), bool(ok), tuple(int(v) for v in box[int(at)]))
        for at, ok, box in zip(prompts.slice, prompts.accepted, prompts.box_S4, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
