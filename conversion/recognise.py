"""Which published network a table of tensors belongs to."""

import dataclasses
import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from sss_jax.conversion import official
from sss_jax.conversion.official import Model, Shapes
from sss_jax.conversion.tensors import Refused, Spec, Tensors, listed

WIDENED = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
"""Types whose every value is a float32."""

_MEMORY = ("memory_", "maskmem", "obj_ptr", "no_obj", "no_mem_pos", "mask_downsample")


@dataclasses.dataclass(frozen=True)
class Difference:
    """What sets a table of tensors apart from a network.

    Attributes:
        missing: names that only the network has.
        extra: names that only the table has.
        wrong: names with another shape in the table.
    """

    missing: list[str]
    extra: list[str]
    wrong: list[str]

    @property
    def count(self) -> int:
        """Number of names it lists."""
        return len(self.missing) + len(self.extra) + len(self.wrong)


@functools.cache
def _known() -> dict[Model, Shapes]:
    return {model: official.shapes(model) for model in official.models()}


def identify(specs: Mapping[str, Spec]) -> Model:
    """The network whose names and shapes these are, by their official names.

    Raises:
        CheckpointError: there is none; the text lists what differs from the nearest.
    """
    found = {name: spec.shape for name, spec in specs.items()}
    differences = {model: compare(found, shapes) for model, shapes in _known().items()}
    nearest = min(differences, key=lambda model: differences[model].count)
    if differences[nearest].count:
        raise Refused(_describe(nearest, differences[nearest], found))
    return nearest


def compare(found: Mapping[str, tuple[int, ...]], expected: Shapes) -> Difference:
    """Differences between two tables of shapes."""
    return Difference(
        missing=[name for name in expected if name not in found],
        extra=[name for name in found if name not in expected],
        wrong=[name for name in expected if found.get(name, expected[name]) != expected[name]],
    )


def _describe(model: Model, difference: Difference, found: Mapping[str, tuple[int, ...]]) -> str:
    shapes = _known()[model]
    wrong = [f"{name} {found[name]} instead of {shapes[name]}" for name in difference.wrong]
    lines = [f"it is no published SAM-2; from the nearest, {model}, it differs by"]
    lines += [
        f"  {len(names)} {kind}: {listed(names)}"
        for kind, names in (
            ("missing", difference.missing),
            ("extra", difference.extra),
            ("of another shape", wrong),
        )
        if names
    ]
    missing = difference.missing
    if missing and all(name.startswith(_MEMORY) for name in missing):
        lines.append("The memory parts are missing: use the checkpoint of the whole (video) model.")
    else:
        lines.append(
            "Use an official checkpoint, or one that was fine-tuned without changes to it."
        )
    return "\n".join(lines)


def widened(tensors: Tensors, not_finite: list[str]) -> Tensors:
    """The tensors as float32, which changes no value.

    Args:
        tensors: with types of `WIDENED`.
        not_finite: receives the names of arrays that hold NaN or infinity, as they are read.

    Raises:
        CheckpointError: a tensor has another type; the text lists them.
    """
    wrong = [f"{name} {s.dtype}" for name, s in tensors.specs.items() if s.dtype not in WIDENED]
    if wrong:
        raise Refused(
            f"{len(wrong)} tensors are neither float32, float16 nor bfloat16: {listed(wrong)}"
        )

    def read(name: str) -> np.ndarray:
        array = tensors[name].astype(np.float32)
        if not np.isfinite(array).all():
            not_finite.append(name)
        return array

    float32 = np.dtype(np.float32)
    return Tensors({name: Spec(s.shape, float32) for name, s in tensors.specs.items()}, read)
