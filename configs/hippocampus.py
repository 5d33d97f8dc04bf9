"""Hippocampus (Medical Segmentation Decathlon, Task04): 1 mm T1 crops, 2 classes, on a CPU.

Command: sss-jax train --config hippocampus:sss --data DIR --workdir W
Hardware: 2 CPU cores. Hours and scores: docs/reference/results.md.
"""

from ml_collections import ConfigDict

from sss_jax.configs import common


def get_config(arg: str = "sss") -> ConfigDict:
    """Return the configuration; `arg` is the method."""
    config = common.from_scratch(common.base(arg), image_size=64, steps=1000)
    config.model.num_classes = 2
    config.data.class_names = ("anterior", "posterior")
    config.data.slice_axis = 2
    config.data.fit = "stretch"
    config.data.clip_slices = 4
    config.data.max_stride = 6
    config.weak.scale_low, config.weak.scale_high = 0.85, 1.18
    config.weak.shift = 0.05
    config.train.labelled_batch = 4
    config.train.unlabelled_batch = 2
    config.eval.slice_bucket = 48
    return config
