"""What devices say to each other in a compiled step, and what must not be in it."""

import collections
import dataclasses

import jax
import optax
import pytest

from sss_jax.hlo import Program
from sss_jax.options import MeshOptions
from sss_jax.roofline import part_of
from sss_jax.train import sharding
from sss_jax.train.mesh import make_mesh_step
from sss_jax.train.state import init_all_params, state_of
from tests.small_networks import with_memory


@pytest.fixture(scope="module")
def compile_for(micro):
    """The compiled step of a method over the first devices, one clip of each stream on each."""
    model, options, batch = with_memory(micro, "none")

    def compile_step(devices, *, semi=True, **mesh):
        chosen = dataclasses.replace(
            options,
            mesh=MeshOptions(**mesh),
            semi=dataclasses.replace(options.semi, enabled=semi),
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(lambda k: init_all_params(model, chosen, k), key)
        optimizer = optax.sgd(1e-2)
        state = jax.eval_shape(lambda p: state_of(p, optimizer), params)
        part = {
            name: {
                field: jax.ShapeDtypeStruct((devices, *x.shape[1:]), x.dtype)
                for field, x in clips.items()
            }
            for name, clips in batch.items()
            if semi or name == "labelled"
        }
        over = sharding.make_mesh(chosen.mesh, jax.devices()[:devices])
        step, _, _ = make_mesh_step(model, chosen, optimizer, state, part, over)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        return Program(step.lower(state, part, key).compile().as_text()), size

    return compile_step


def exchanged(program):
    """Bytes per device and step, by part of the step and kind."""
    found = collections.Counter()
    for one in program.collectives():
        found[part_of(one.source), one.kind] += one.nbytes * one.times
    return found


@pytest.mark.slow
def test_a_step_exchanges_gradients_partners_and_sums_alone(compile_for):
    few, size = compile_for(4)
    many, _ = compile_for(8)
    found = exchanged(many)
    assert found == exchanged(few), "constant per device as devices grow"
    assert {part for part, _ in found} <= {"reduce_gradients", "cutmix_partner", "losses", "other"}
    assert found["reduce_gradients", "all-reduce"] == pytest.approx(size, rel=0.01)
    assert found["cutmix_partner", "collective-permute"] > 0
    rest = {k: v for k, v in found.items() if k[0] in ("losses", "other")}
    assert sum(rest.values()) < 4096, rest
    assert many.host_calls() == []
    assert not many.types() & {"f64", "c64", "c128", "s64", "f16"}


@pytest.mark.slow
def test_cut_parameters_are_gathered_and_their_gradients_scattered(compile_for):
    program, size = compile_for(8, semi=False, fsdp=4)
    found = exchanged(program)
    assert {part for part, _ in found} <= {
        "gather_parameters",
        "reduce_gradients",
        "optimizer",
        "losses",
        "other",
    }
    gathered = found["gather_parameters", "all-gather"]
    # The teacher is not gathered where nothing is unlabelled; a fifth of this network is not cut.
    assert 0.6 * size < gathered <= 1.01 * size
    scattered = found["reduce_gradients", "reduce-scatter"]
    assert scattered == pytest.approx(gathered / 4, rel=0.01)
