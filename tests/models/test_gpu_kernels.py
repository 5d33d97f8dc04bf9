"""Kernels compiled for GPUs that are not here, by JAX's plug-in for CUDA, at every network's width.

The compiler itself refuses what does not fit a core's registers or shared memory.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax[cuda12] not installed"
    ),
]

# In a program of its own: the plug-in is registered before JAX first looks for devices.
PROGRAM = """
import json, sys
from sss_jax import compilers, topology
device = compilers.gpu_devices(topology.parse(sys.argv[1]))[0]
import jax, jax.numpy as jnp
from sss_jax import flops
from sss_jax.hlo import Program
from sss_jax.models.attention import large_attention

def like(*shape):
    here = jax.sharding.SingleDeviceSharding(device)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)

heads, queries, keys, channels, values = map(int, sys.argv[2:])
of = like(1, heads, queries, channels), like(1, heads, keys, channels), like(1, heads, keys, values)
found = {}
for kernels in ("gpu", "off"):
    loss = lambda *a: large_attention(*a, kernels=kernels).astype("float32").sum()
    gradient = jax.grad(loss, (0, 1, 2))
    compiled = jax.jit(gradient).lower(*of).compile()
    costs = Program(compiled.as_text()).costs()
    found[kernels] = {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "flops": sum(c.flops * c.times for c in costs),
        "bytes": sum(c.nbytes * c.times for c in costs),
        "counted": flops.count(gradient, *of),
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("chip", ["h100-1", "a100-1"])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "channels", "values"),
    [
        (4, 4096, 4096, 96, 96),  # tiny's and small's trunk
        (8, 4096, 4096, 56, 56),  # base_plus
        (8, 4096, 4096, 72, 72),  # large
        (1, 4096, 4096, 256, 256),  # memory attention, looking at its own slice
        (3, 4096, 8 * 4096 + 28, 256, 64),  # and at others
        (3, 1024, 2 * 1024 + 8, 256, 64),  # at 512 px
    ],
)
def test_attention_compiles_and_writes_no_logits(chip, heads, queries, keys, channels, values):
    sizes = map(str, (heads, queries, keys, channels, values))
    command = [sys.executable, "-c", PROGRAM, chip, *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours, loop = found["gpu"], found["off"]
    logits, arrays = 4 * heads * queries * keys, 2 * heads * (queries + keys) * (channels + values)
    assert ours["temporary"] < logits
    # Three kernels read and write each array once, and fill it up before and cut it afterwards.
    assert ours["bytes"] < 12 * arrays
    assert loop["bytes"] > 6 * logits
    assert ours["flops"] == pytest.approx(ours["counted"], rel=0.01)
