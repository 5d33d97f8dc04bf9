"""The embedded default: phantoms written by `sss-jax data phantoms`, 3 classes.

Command: make demo
Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from sss_jax.configs import common
from sss_jax.data.anatomy import CLASS_NAMES


def get_config(arg: str = "sss") -> ConfigDict:
    """Return the configuration; `arg` is the method."""
    config = common.from_scratch(common.base(arg), image_size=64, steps=400)
    config.model.num_classes = 3
    config.data.class_names = CLASS_NAMES
    # In so few steps a teacher that knows background alone would hold the student back.
    config.semi.ramp_steps = config.train.steps
    config.data.clip_slices = 4
    config.data.max_stride = 3
    config.train.labelled_batch = 2
    config.train.unlabelled_batch = 2
    config.train.eval_every = 100
    config.train.save_every = 100
    config.eval.slice_bucket = 24
    return config
