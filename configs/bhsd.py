"""BHSD: brain haemorrhage on head CT, 5 classes, 96 labelled and 1,980 unlabelled volumes.

Command: sss-jax train --config bhsd:sss --data DIR --workdir W
Hardware: one GPU or TPU host with 16 GB a device. Not run here: the
volumes may not be redistributed.
The window is the wide one of the data set's authors, [-100, 200] HU; brain [0, 80] and subdural
[-15, 115] are `--config.data.window_low=0 --config.data.window_high=80` and so on.
"""

from ml_collections import ConfigDict

from sss_jax.configs import common


def get_config(arg: str = "sss") -> ConfigDict:
    """Return the configuration; `arg` is the method."""
    config = common.base(arg)
    config.model.preset = "small"
    config.model.image_size = 512
    config.model.num_classes = 5
    config.model.dtype = "bfloat16"
    config.data.class_names = (
        "extradural",
        "intraparenchymal",
        "intraventricular",
        "subarachnoid",
        "subdural",
    )
    config.data.normalise = "window"
    config.data.window_low = -100.0
    config.data.window_high = 200.0
    config.data.clip_slices = 8
    config.train.steps = 30_000
    config.train.labelled_batch = 2
    config.train.unlabelled_batch = 2
    config.eval.slice_bucket = 64
    return config
