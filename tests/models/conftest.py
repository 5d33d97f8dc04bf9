"""Masks of every kind, which the tests of PCSW draw too, and TPU kernels without a TPU."""

import pytest
from jax.experimental import pallas as pl

from tests.ssl.conftest import depth_first, make_mask, mask_kinds

__all__ = ["depth_first", "interpreted", "make_mask", "mask_kinds"]


@pytest.fixture
def interpreted(monkeypatch):
    """Names of the kernels that ran, all of them interpreted."""
    names = []
    call = pl.pallas_call

    def interpret(*args, **kwargs):
        names.append(kwargs["name"])
        return call(*args, **{**kwargs, "interpret": True})

    monkeypatch.setattr(pl, "pallas_call", interpret)
    return names
