"""SSS (semi-supervised SAM-2 for medical image segmentation) in JAX/Flax."""

__version__ = "0.1.0"
