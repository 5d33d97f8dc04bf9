"""Masks of every kind, which the tests of PCSW draw too."""

from tests.ssl.conftest import depth_first, make_mask, mask_kinds

__all__ = ["depth_first", "make_mask", "mask_kinds"]
