"""How far two outputs are apart; the arithmetic is `conversion.verify`'s."""

from typing import Any, NamedTuple

import numpy as np

from sss_jax.conversion import verify


class Output(NamedTuple):
    """One output, from both sides."""

    name: str
    ours: Any
    theirs: Any


def errors(ours, theirs):
    """Largest and root mean square error; a reference that is hardly more than 0 is refused."""
    theirs = np.asarray(theirs, np.float32)
    assert np.sqrt(np.mean(np.square(theirs))) > 1e-3, "the reference is degenerate"
    return verify.errors(np.asarray(ours), theirs)


def worst(outputs):
    """Worst (largest, root mean square) error of each output, over all that share its name."""
    found = {}
    for name, ours, theirs in outputs:
        both = zip(found.get(name, (0.0, 0.0)), errors(ours, theirs), strict=True)
        found[name] = tuple(float(np.maximum(a, b)) for a, b in both)  # NaN stays
    return found
