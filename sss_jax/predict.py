"""Segment volumes with a trained network: no prompts, no labels, the input's own grid."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sss_jax import config
from sss_jax.atomic import write_json
from sss_jax.axes import PyTree
from sss_jax.data.cases import find_images, load_split
from sss_jax.data.examples import Example, prepare
from sss_jax.data.folders import PREDICTION_STAMP
from sss_jax.data.nifti import read_volume, stem, write_labels
from sss_jax.errors import CheckpointError, ConfigError, DataError
from sss_jax.metrics.scores import usual_names
from sss_jax.models.sss import build_model
from sss_jax.options import Options
from sss_jax.ssl.volume import VolumeFunction, make_volume_function, predict_example


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained network, ready for volumes."""

    options: Options
    params: PyTree
    function: VolumeFunction
    origin: dict[str, Any]

    def __call__(self, example: Example) -> np.ndarray:
        """Return labels on the stored grid of the example's volume."""
        return predict_example(self.function, self.params, example, self.options)

    def predict_file(self, source: Path, target: Path) -> None:
        """Segment one NIfTI file and write the labels atomically, on the same grid."""
        volume = read_volume(source, self.options.data.max_voxels)
        example = prepare(volume, None, self.options.model.image_size, self.options.data)
        write_labels(target, self(example), volume)


def load_predictor(workdir: Path, which: str = "best") -> Predictor:
    """Load the network of a run folder; settings come from the JSON beside the checkpoints.

    Args:
        workdir: run folder written by `sss-jax train`.
        which: "best" on the validation cases, or "latest".

    Raises:
        CheckpointError: no run, no checkpoint, or none undamaged.
    """
    from sss_jax.train.checkpoint import Checkpointer

    settings = workdir / "config.json"
    if not settings.is_file():
        raise CheckpointError(f"{workdir} is no run folder: {settings.name} is missing")
    options = config.from_dict(json.loads(settings.read_text()))
    entry = "ema" if options.eval.weights == "ema" else "params"
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        params, meta = checkpointer.load_params(which, entry)
        net = params["net"] if entry == "params" else params
        if options.memory.kind == "self_sorting":
            # Of the same step: a run that goes on may have made another one the latest meanwhile.
            net = {"net": net, "bank": checkpointer.load_params(meta["step"], "bank")[0]}
    origin = {
        "workdir": str(workdir.resolve()),
        "step": meta["step"],
        "weights": entry,
        "class_names": _class_names(options),
    }
    function = make_volume_function(build_model(options), options)
    return Predictor(options, jax.device_put(net), function, origin)


def _class_names(options: Options) -> list[str]:
    return list(options.data.class_names) or usual_names(options.model.num_classes)


def target_name(source: Path) -> str:
    """Return the file name of a prediction: that of the input, always .nii.gz."""
    return f"{stem(source)}.nii.gz"


def run_predict(
    workdir: Path,
    source: Path,
    output: Path,
    *,
    which: str = "best",
    subset: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Segment an image, a folder of images, or one subset of a data folder.

    Returns:
        Failures by file name; empty when every file was segmented.

    Raises:
        DataError: no images, or `output` holds predictions of other weights.
        CheckpointError: the run folder has no undamaged checkpoint.
    """
    predictor = load_predictor(workdir, which)
    sources = _sources(source, subset, predictor.options)
    _stamp(output, predictor)
    return predict_files(predictor, sources, output, report)


def predict_files(
    predictor: Predictor,
    sources: Iterable[Path],
    output: Path,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Segment files one by one into `output`; a bad file does not stop the others.

    Files that are there already are skipped, so a stopped job can be run again. What failed is
    written to `output/failures.json` and returned, by file name.
    """
    failures: dict[str, str] = {}
    for source in sources:
        target = output / target_name(source)
        if target.exists():
            report(f"{source.name}: done already")
            continue
        try:
            predictor.predict_file(source, target)
            report(f"{source.name}: {target}")
        except DataError as error:
            failures[source.name] = str(error)
            report(f"{source.name}: FAILED: {error}")
    if failures:
        write_json(output / "failures.json", failures)
    else:
        (output / "failures.json").unlink(missing_ok=True)
    return failures


def _sources(source: Path, subset: str | None, options: Options) -> list[Path]:
    if subset is None:
        return find_images(source)
    cases = getattr(load_split(source, options.data.split), subset)
    if not cases:
        raise ConfigError(f"{source}: the split {options.data.split} has no {subset} cases")
    return [case.image for case in cases]


def _stamp(output: Path, predictor: Predictor) -> None:
    """Mark the folder with the weights it belongs to; refuse to mix two networks' labels."""
    output.mkdir(parents=True, exist_ok=True)
    stamp = output / PREDICTION_STAMP
    if stamp.is_file() and json.loads(stamp.read_text()) != predictor.origin:
        raise DataError(
            f"{output} holds predictions of other weights (see {stamp.name}); "
            "choose another folder or remove it"
        )
    write_json(stamp, predictor.origin)
