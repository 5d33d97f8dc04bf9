"""Random keys that follow the example, not the device that holds it."""

import jax

from sss_jax.axes import Array, Int, Key

__all__ = ["example_keys"]


def example_keys(key: Key[Array, ""], id_B: Int[Array, " B"]) -> Key[Array, " B"]:
    """Derive one key per example from its global id.

    An example draws the same numbers whichever device holds it and whatever the batch around it.

    Args:
        key: the key of the run (or of one use of it: weak view, strong view, ...).
        id_B: global ids of the examples, non-negative.

    Returns:
        One key per example.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, id_B)
