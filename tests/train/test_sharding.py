"""Where arrays lie: the rules, the mesh, and that nothing is lost on the way."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sss_jax.errors import ConfigError
from sss_jax.options import MeshOptions, TrainOptions
from sss_jax.ssl.weak_to_strong import sss_loss
from sss_jax.train import sharding
from sss_jax.train.state import init_all_params
from sss_jax.train.step import root_key
from tests.small_networks import with_memory

CUT = {
    "net/block/attention/kernel": ((64, 192), P(None, "fsdp")),
    "net/stem/kernel": ((7, 7, 3, 96), P(None, None, None, "fsdp")),
    "net/head/kernel": ((4096, 3), P("fsdp")),
    "net/odd/kernel": ((4095, 3), P()),
    "net/block/attention/bias": ((8192,), P()),
    "net/norm/scale": ((8192,), P()),
    "net/pos_embed": ((1, 16, 16, 64), P(None, None, None, "fsdp")),
    "net/small/kernel": ((8, 8), P()),
    "opt_state/0/mu/net/block/attention/kernel": ((64, 192), P(None, "fsdp")),
    "bank/memory_KTHWD": ((2, 16, 16, 16, 64), P()),
    "step": ((), P()),
}


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        node = tree
        *parents, name = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


@pytest.mark.parametrize("path", CUT)
def test_rules(path):
    shape, expected = CUT[path]
    mesh = sharding.make_mesh(MeshOptions(fsdp=4), jax.devices())
    spec = sharding.specs(nested({path: jax.ShapeDtypeStruct(shape, np.float32)}), mesh)
    assert jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, P)) == [expected]


def test_fsdp_of_one_cuts_nothing():
    mesh = sharding.make_mesh(MeshOptions(), jax.devices())
    spec = sharding.specs({"kernel": jax.ShapeDtypeStruct((4096, 4096), np.float32)}, mesh)
    assert spec == {"kernel": P()}


def test_nine_tenths_of_the_network_is_cut(micro):
    """What stays whole on every device is what is too small to matter."""
    from sss_jax import config
    from sss_jax.models.sss import build_model

    options = config.load("acdc:sss", ["model.preset=tiny"])
    model = build_model(options)
    shapes = jax.eval_shape(
        lambda k: init_all_params(model, options, k), jax.eval_shape(lambda: jax.random.key(0))
    )
    mesh = sharding.make_mesh(MeshOptions(fsdp=8), jax.devices())
    cuts = sharding.specs(shapes, mesh)
    sizes = jax.tree.map(
        lambda spec, leaf: leaf.size * ("fsdp" in spec),
        cuts,
        shapes,
        is_leaf=lambda x: isinstance(x, P),
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sum(jax.tree.leaves(sizes)) > 0.9 * total


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (MeshOptions(), (8, 1, 1)),
        (MeshOptions(fsdp=4), (2, 4, 1)),
        (MeshOptions(data=1, fsdp=4, context=2), (1, 4, 2)),
    ],
)
def test_mesh_shapes(options, shape):
    mesh = sharding.make_mesh(options, jax.devices()[::-1])
    assert tuple(mesh.shape.values()) == shape
    assert [d.id for d in mesh.devices.ravel()] == [d.id for d in jax.devices()]


@pytest.mark.parametrize("options", [MeshOptions(fsdp=3), MeshOptions(data=2), MeshOptions(16)])
def test_a_mesh_that_does_not_fit_is_refused(options):
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        sharding.make_mesh(options, jax.devices())


def test_uneven_batches_are_refused_with_the_multiple():
    train = TrainOptions(labelled_batch=8, unlabelled_batch=12, accumulate=2)
    sharding.check_batches(train, 4, semi=False)
    with pytest.raises(ConfigError, match=r"unlabelled_batch=12 .* multiple of 8"):
        sharding.check_batches(train, 4, semi=True)


def test_whole_and_reduce_are_the_average_over_devices():
    """Cut parameters come together; gradients are averaged, each device keeping its own part."""
    mesh = sharding.make_mesh(MeshOptions(fsdp=4), jax.devices())
    params = {"a": {"kernel": jnp.arange(64.0 * 128).reshape(64, 128)}, "b": {"bias": jnp.ones(3)}}
    cuts = sharding.specs(params, mesh)
    assert cuts["a"]["kernel"] == P(None, "fsdp")
    clips = jnp.arange(8.0)

    def device(shards, x):
        everything = sharding.whole(shards, cuts, "float32")
        gradients = jax.tree.map(lambda p: p * x[0], everything)
        return sharding.reduce(gradients, cuts)

    over = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(cuts, P(sharding.CLIPS)),
        out_specs=cuts,
        check_vma=False,
    )
    placed = jax.device_put(params, sharding.place(cuts, mesh))
    found = jax.jit(over)(placed, clips)
    expected = jax.tree.map(lambda p: np.asarray(p) * np.mean(np.arange(8.0)), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    text = jax.jit(over).lower(placed, clips).as_text()
    assert "reduce_scatter" in text
    assert "all_gather" in text


def test_kernels_are_sent_in_the_type_of_the_computation():
    mesh = sharding.make_mesh(MeshOptions(fsdp=8), jax.devices())
    values = jnp.arange(64.0 * 128).reshape(64, 128) + 0.1
    params = {"kernel": values, "embedding": values}
    cuts = sharding.specs(params, mesh)
    gather = jax.jit(
        jax.shard_map(
            lambda shards: sharding.whole(shards, cuts, "bfloat16"),
            mesh=mesh,
            in_specs=(cuts,),
            out_specs=P(),
            check_vma=False,
        )
    )
    found = gather(jax.device_put(params, sharding.place(cuts, mesh)))
    np.testing.assert_array_equal(found["kernel"], values.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(found["embedding"], values)
    text = gather.lower(params).as_text()
    sent = re.findall(r"all_gather.*: \(tensor<64x16x(\w+)>\)", text)
    assert sorted(sent) == ["bf16", "f32"]


@pytest.mark.parametrize("memory", ["none", pytest.param("fifo", marks=pytest.mark.slow)])
def test_the_loss_reads_kernels_in_the_type_of_the_computation_alone(micro, memory):
    """So sending them in it changes no bit; other parameters it reads in float32."""
    model, options, batch = with_memory(micro, memory)
    model = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))

    @jax.jit
    def loss(params):
        out = sss_loss(
            params, params["net"], batch, root_key(1), jnp.int32(0), model=model, options=options
        )
        return out[0]

    def rounded(names):
        def low(path, x):
            chosen = path[-1].key.endswith(names)
            return x.astype(jnp.bfloat16).astype(x.dtype) if chosen else x

        return jax.tree_util.tree_map_with_path(low, params)

    assert loss(params) == loss(rounded("kernel")) != loss(rounded("embedding"))


def test_rows_are_cut_only_in_images():
    batch = {"labelled": {"image": 0, "label": 0, "slice_mask": 0, "id": 0}}
    found = sharding.batch_specs(batch)["labelled"]
    assert found["image"] == found["label"] == P(sharding.CLIPS, None, "context")
    assert found["slice_mask"] == found["id"] == P(sharding.CLIPS)
    assert set(sharding.batch_specs(batch, rows=False)["labelled"].values()) == {P(sharding.CLIPS)}
