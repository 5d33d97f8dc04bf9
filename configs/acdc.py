"""ACDC: short-axis cine cardiac MRI, 3 classes, at a size that two CPU cores can train.

Command: sss-jax train --config acdc:sss --data DIR --workdir W
Hardware: 2 CPU cores. For the network and image size of publications add
`--config.model.preset=tiny --config.model.image_size=256` on an accelerator.
The data are CC BY-NC-SA 4.0: weights trained on them are for non-commercial use.
"""

from ml_collections import ConfigDict

from sss_jax.configs import common


def get_config(arg: str = "sss") -> ConfigDict:
    """Return the configuration; `arg` is the method."""
    config = common.from_scratch(common.base(arg), image_size=96, steps=1500)
    config.model.num_classes = 3
    config.data.class_names = ("right ventricle", "myocardium", "left ventricle")
    config.data.slice_axis = 2
    config.data.fit = "letterbox"
    config.data.clip_slices = 4
    config.data.max_stride = 2
    config.train.labelled_batch = 4
    config.train.unlabelled_batch = 2
    config.eval.slice_bucket = 16
    return config
