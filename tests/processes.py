"""Training in a process of its own, as a user starts it."""

import os
import sys


def train_command(config, data, workdir, *words):
    verb = [sys.executable, "-m", "sss_jax.cli", "train", "--json"]
    folders = ["--data", str(data), "--workdir", str(workdir)]
    return [*verb, "--config", str(config), *folders, *words]


def environment(cache, **changes):
    """This process's own, on one CPU device, with a folder for compiled programs."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return own | settings | changes
