"""Compilers for machines that are not here."""

import pytest
from jax.experimental import topologies

from sss_jax import compilers
from sss_jax.errors import ConfigError
from sss_jax.topology import CHIPS, parse


@pytest.fixture
def asked(monkeypatch):
    found = {}

    def describe(**how):
        found.update(how)
        raise NotImplementedError("no such plug-in\nfor reasons")

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    # Restored afterwards: the compilers read it from the environment.
    for name in ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "1")
    return found


@pytest.mark.parametrize(
    ("name", "package"), [("v5e-16", "libtpu"), ("2xh100-16", r'"jax\[cuda12\]"')]
)
def test_a_compiler_that_is_not_installed_says_what_to_install(asked, name, package):
    with pytest.raises(ConfigError, match=rf"\(no such plug-in\); .* pip install {package}"):
        compilers.devices_of(parse(name))


def test_a_slice_of_tpus_is_asked_for_by_its_shape(asked):
    with pytest.raises(ConfigError):
        compilers.devices_of(parse("2xv5p-64"))
    assert asked == {"platform": "tpu", "topology_name": "v5p:2x4x4", "num_slices": 2}


def test_gpus_are_described(asked):
    with pytest.raises(ConfigError):
        compilers.devices_of(parse("2xh100-16"))
    assert (asked["platform"], asked["topology"]) == ("cuda", "2x2x8")
    described = asked["target_config"]
    assert "core_count: 132" in described
    assert "cuda_compute_capability { major: 9 minor: 0 }" in described
    assert "memory_bandwidth: 3350000000000" in described
    assert described.count("{") == described.count("}")


def test_every_gpu_that_has_a_name_can_be_described(asked):
    for name in CHIPS:
        with pytest.raises(ConfigError, match="no such plug-in"):
            compilers.devices_of(parse(f"{name}-8"))
