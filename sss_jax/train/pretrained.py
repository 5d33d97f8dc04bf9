"""Start of a run from converted SAM-2 weights."""

from pathlib import Path
from typing import Any

import jax

from sss_jax.axes import PyTree
from sss_jax.conversion import sam2 as conversion
from sss_jax.errors import ConfigError
from sss_jax.options import Options


def with_converted(params: PyTree, options: Options) -> PyTree:
    """Put the weights of `model.init` in place of the random ones.

    What SAM-2 does not have (class tokens, coarse head, DFE) stays as it was drawn: with
    `model.class_token_std=0` the network segments exactly as SAM-2 does. Parts that the network
    was built without (memory) are left out.

    Args:
        params: parameters of step 0.
        options: all settings; without `model.init` the parameters return as they are.

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: it holds another size of network.
    """
    if not options.model.init:
        return params
    info, converted = conversion.load(Path(options.model.init))
    if info.variant != options.model.preset:
        raise ConfigError(
            f"model.init={options.model.init} holds SAM-2 {info.variant}; "
            f"set model.preset={info.variant}"
        )
    net = params["net"]
    return params | {"net": net | {"sam2": _replace(net["sam2"], converted)}}


def _replace(drawn: dict[str, Any], converted: dict[str, Any]) -> dict[str, Any]:
    """Take every array of `drawn` from `converted`, which may hold more."""
    return {
        name: _replace(value, converted[name])
        if isinstance(value, dict)
        else jax.numpy.asarray(converted[name], value.dtype)
        for name, value in drawn.items()
    }
