"""Volumes per minute through prediction: `sss-jax bench predict_rate`.

A volume, synthetic or the first of a folder, goes from its file to the file of its labels, as
`sss-jax predict` does it, and, beside it, the network's share alone: prepared and on the device
already.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np

from sss_jax.benchmarks import result
from sss_jax.benchmarks.request import Measured, Request
from sss_jax.data.examples import prepare
from sss_jax.data.folders import find_images
from sss_jax.data.nifti import read_volume
from sss_jax.data.sources import PREFIX
from sss_jax.options import Options
from sss_jax.predict import Predictor
from sss_jax.ssl.volume import make_volume_function, pad_slices
from sss_jax.train.setup import set_up
from sss_jax.train.state import init_all_params
from sss_jax.train.step import root_key


def measure(request: Request) -> Measured:
    """Time prediction with the network of every method that is asked for."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for method, options in request.options().items():
            source = some_volume(Path(scratch), options, request.data)
            request.say(f"{method}: predicting {source.name}")
            target = Path(scratch) / f"{method}_labels.nii.gz"
            rows += _rows(method, options, source, target, request)
    return Measured(rows, {})


def some_volume(scratch: Path, options: Options, data: str | None) -> Path:
    """Return the first image of a folder, or a synthetic one written to `scratch`.

    Raises:
        DataError: the folder holds no NIfTI file.
    """
    if data is None or data.startswith(PREFIX):
        return write_volume(scratch / "volume.nii.gz", options)
    return find_images(Path(data))[0]


def write_volume(path: Path, options: Options) -> Path:
    """Write noise with a ball in it, of `eval.slice_bucket` slices, and return its path."""
    size, slices = options.model.image_size, options.eval.slice_bucket
    axes = (np.linspace(-1, 1, n) for n in (size, size, slices))
    away = sum(a**2 for a in np.meshgrid(*axes, indexing="ij"))
    image = np.random.default_rng(0).random((size, size, slices)) + (away < 0.3)
    array = (1000 * image).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    return path


def make_predictor(options: Options) -> Predictor:
    """Return a network with random parameters, ready for volumes."""
    model, _, memory, _ = set_up(options)
    params = jax.jit(lambda key: init_all_params(model, options, key)["net"])(root_key(0))
    params = {"net": params, **memory} if memory else params
    return Predictor(options, params, make_volume_function(model, options), {})


def volume_args(predictor: Predictor, source: Path) -> tuple[Any, Any, Any]:
    """Return what the network is called with for a file, on the device."""
    options = predictor.options
    volume = read_volume(source, options.data.max_voxels)
    example = prepare(volume, None, options.model.image_size, options.data)
    return (predictor.params, *jax.device_put(pad_slices(example.image_SHW, options)))


def _rows(
    method: str, options: Options, source: Path, target: Path, request: Request
) -> list[dict[str, Any]]:
    predictor = make_predictor(options)
    args = volume_args(predictor, source)
    runs = {
        "end to end": lambda: predictor.predict_file(source, target),
        "on the device": lambda: jax.block_until_ready(predictor.function(*args)),
    }
    times = result.alternate(runs, request.repeats, request.trace("predict_rate"))
    rows = []
    for name, taken in times.items():
        summary = result.summary(taken)
        rate = round(60 / summary["median"], 2)
        fixed = {"name": f"{method}: {name}", "slices": len(args[1])}
        rows.append({**fixed, "volume_s": summary, "volumes_per_min": rate})
    return rows
