"""What the configurations share: the methods, and the CPU-sized network."""

from ml_collections import ConfigDict

from sss_jax.config import default_config
from sss_jax.errors import ConfigError

METHODS = ("supervised", "fixmatch", "unimatch_v2", "sss", "sss_sketch")


def base(method: str) -> ConfigDict:
    """Return the defaults with the switches of one method.

    `supervised` learns from labelled images alone; `fixmatch` adds one strong view and the network
    as its own teacher (Sohn et al. 2020); `unimatch_v2` has two strong views, the EMA teacher and
    complementary dropout (Yang et al. 2024); `sss` adds DFE, PCSW and memory (Zhu et al. 2026).
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    config = default_config()
    config.method = method
    if method == "sss_sketch":
        config.semi.teacher = "student"
        config.semi.confidence = 0.0
        config.semi.dropout = False
        config.semi.labelled_prompts = "gt_mask"
        config.dfe.pair = "weak_strong"
        config.dfe.merge = "replace"
        config.dfe.level_4 = True
    elif method != "sss":
        config.dfe.enabled = False
        config.pcsw.enabled = False
        config.memory.kind = "none"
        config.semi.labelled_prompts = "none"
    if method == "fixmatch":
        config.semi.views = 1
        config.semi.teacher = "student"
        config.semi.dropout = False
    if method == "supervised":
        config.semi.enabled = False
    return config


def from_scratch(config: ConfigDict, *, image_size: int, steps: int) -> ConfigDict:
    """Set up the `nano` network, trained on a CPU from random weights."""
    config.model.preset = "nano"
    config.model.image_size = image_size
    config.model.class_token_std = 0.5
    config.memory.remat = config.dfe.remat = False
    config.optimizer.rate = config.optimizer.encoder_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.train.steps = steps
    # Scanners turn bodies one way: a short run would learn quarter turns and mirror images at the
    # cost of what is seen.
    config.weak.rot90_flip = 0.0
    config.weak.rotate = 1.0
    # Short runs on few labels: at 0.95 no foreground pixel is ever trusted, and a teacher with a
    # memory of 250 steps lags behind what the student knows.
    config.semi.ema_decay = 0.99
    config.semi.confidence = min(config.semi.confidence, 0.7)
    config.semi.unlabelled_dice = True
    # An early teacher knows less than the labels: learning from it at once holds the student back.
    config.semi.ramp = "gaussian"
    config.semi.ramp_steps = steps * 3 // 5
    return config
