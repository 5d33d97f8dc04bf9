"""Training in a process of its own, as a user starts it."""

import os
import sys

COMPILE_QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Programs of tests run for milliseconds: so the step compiles in 12 s instead of 70."""


def train_command(config, data, workdir, *words):
    verb = [sys.executable, "-m", "sss_jax.cli", "train", "--json"]
    folders = ["--data", str(data), "--workdir", str(workdir)]
    return [*verb, "--config", str(config), *folders, *words]


def environment(cache, **changes):
    """This process's own, on one CPU device, with a folder for programs that compile quickly."""
    settings = {
        "XLA_FLAGS": COMPILE_QUICKLY,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    return dict(os.environ) | settings | changes
