"""Compilers for accelerators that are not here: TPU slices and GPUs, by their topology.

Both are plug-ins of JAX that compile on any machine, once they know what for. A TPU is known by
its name; of a GPU the compiler wants to know what it would ask the driver.
"""

import os
from typing import Any, NamedTuple

from sss_jax.errors import ConfigError
from sss_jax.topology import Topology


class _Gpu(NamedTuple):
    """What the driver of a GPU would say: sizes in bytes."""

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    clock_ghz: float
    cache: int
    shared: int


# NVIDIA's tuning guides and data sheets.
_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40 * 2**20, 164 * 2**10),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
    "h200": _Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
}
_CUDNN = (9, 10)
_CUDA = (
    '"jax[cuda12]"; a program of yours sets JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before JAX looks for '
    "devices"
)
_RESERVED = 2**10
"""Shared memory of a block that the driver keeps, bytes."""


def devices_of(topology: Topology) -> list[Any]:
    """Return devices to compile for.

    Raises:
        ConfigError: the compiler is not installed.
    """
    return tpu_devices(topology) if topology.is_tpu else gpu_devices(topology)


def tpu_devices(topology: Topology) -> list[Any]:
    """Return the devices of a slice that is not here.

    Raises:
        ConfigError: TPU's compiler is not installed.
    """
    # Without these the compiler looks for a TPU, its metadata server, or other compilers.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    shape = f"{topology.chip.name}:{topology.grid}"
    return _devices("tpu", "libtpu", topology_name=shape, **slices)


def gpu_devices(topology: Topology) -> list[Any]:
    """Return GPUs that are not here.

    Raises:
        ConfigError: JAX's plug-in for CUDA is not installed.
    """
    # Without it the plug-in wants a driver before it is registered.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return _devices(
        "cuda",
        _CUDA,
        topology_name=topology.chip.name,
        topology=f"{topology.slices}x{topology.grid}",
        target_config=_described(topology),
    )


def _devices(platform: str, package: str, **how: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, **how).devices)
    except Exception as error:  # plug-ins raise what they like
        raise ConfigError(
            f"no compiler for {platform.upper()} ({str(error).splitlines()[0][:160]}); "
            f"install it with: pip install {package}"
        ) from None


def _described(topology: Topology) -> str:
    """Describe a GPU as the compiler wants it: a text protocol buffer."""
    chip, gpu = topology.chip, _GPUS[topology.chip.name]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": gpu.shared - _RESERVED,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": chip.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    fields = "\n".join(f"  {key}: {value}" for key, value in info.items())
    major, minor = gpu.capability
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{fields}\n{capability}\n}}\n"
        f'platform_name: "CUDA"\n'
        f"dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}\n"
        f'device_description_str: "{gpu.name}"\n'
    )
