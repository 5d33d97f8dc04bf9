"""The self-sorting bank against a plain NumPy one, and the step that uses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.ssl.self_sorting import (
    ImageBank,
    Newcomers,
    Recall,
    empty_bank,
    look_up,
    remember_images,
)

CLASSES, SIZE, POSITIONS, WIDTH, LENGTH = 2, 3, 4, 2, 5


def nothing():
    return ImageBank(
        jnp.zeros((CLASSES, SIZE, POSITIONS, WIDTH)),
        jnp.zeros((CLASSES, SIZE)),
        jnp.zeros((CLASSES, SIZE, LENGTH)),
        jnp.zeros(CLASSES, jnp.int32),
    )


def images(seed, count):
    """Memories around a few directions, so that some are nearly alike."""
    rng = np.random.default_rng(seed)
    ways = rng.normal(size=(3, POSITIONS, WIDTH))
    memory = ways[rng.integers(3, size=(count, CLASSES))]
    memory = memory + 0.3 * rng.normal(size=memory.shape)
    iou = rng.random((count, CLASSES))
    embedding = rng.normal(size=(count, LENGTH))
    return Newcomers(*(jnp.asarray(x, jnp.float32) for x in (memory, iou, embedding)))


def slow(new, valid):
    """One class after the other, entries in lists."""
    banks = []
    for k in range(CLASSES):
        bank: list[tuple] = []
        for n in np.flatnonzero(valid):
            one = tuple(np.asarray(x) for x in (new.memory_NKPM[n, k], new.iou_NK[n, k]))
            entry = (*one, np.asarray(new.embedding_NE[n]))
            if len(bank) < SIZE:
                bank.append(entry)
                continue
            flat = [e[0].ravel() / np.linalg.norm(e[0]) for e in bank]
            own = one[0].ravel() / np.linalg.norm(one[0])
            s = [f @ own for f in flat]
            i = int(np.argmin(s))
            between = [-np.inf if j == i else flat[i] @ f for j, f in enumerate(flat)]
            j = int(np.argmax(between))
            if s[i] < between[j] and one[1] > bank[j][1] - 0.1:
                bank[j] = entry
        banks.append(bank)
    return banks


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([1, 4, 12]))
def test_equals_the_slow_bank(seed, count):
    new = images(seed, count)
    valid = np.random.default_rng(seed).random(count) < 0.8
    got = jax.jit(remember_images)(nothing(), new, jnp.asarray(valid))
    for k, bank in enumerate(slow(new, valid)):
        assert got.count_K[k] == len(bank)
        for t, (memory, iou, embedding) in enumerate(bank):
            np.testing.assert_array_equal(got.memory_KTPM[k, t], memory)
            assert got.iou_KT[k, t] == iou
            np.testing.assert_array_equal(got.embedding_KTE[k, t], embedding)


def test_something_is_replaced_and_something_dropped():
    """Otherwise the comparison above would compare appending alone."""
    new = images(0, 40)
    full = remember_images(nothing(), jax.tree.map(lambda x: x[:SIZE], new), jnp.ones(SIZE, bool))
    offer = jax.jit(remember_images)
    changes = 0
    for n in range(SIZE, 40):
        one = jax.tree.map(lambda x, n=n: x[n : n + 1], new)
        after = offer(full, one, jnp.ones(1, bool))
        changes += bool((after.iou_KT != full.iou_KT).any())
    assert 0 < changes < 40 - SIZE


def test_the_number_of_devices_does_not_matter():
    new, valid = images(5, 16), jnp.arange(16) % 5 != 1
    one = remember_images(nothing(), new, valid)
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), (new, valid))
    many = jax.pmap(lambda n, v: remember_images(nothing(), n, v, "d"), axis_name="d")(*split)
    for shard in range(8):
        jax.tree.map(lambda a, b, s=shard: np.testing.assert_array_equal(a[s], b), many, one)


def test_at_test_the_most_similar_entries_are_seen():
    new = images(3, 2)
    bank = remember_images(nothing(), new, jnp.ones(2, bool))
    memory, valid = look_up(Recall(bank, 3, None), 2.0 * new.embedding_NE[1:])
    np.testing.assert_array_equal(valid, [[[True, True, False]] * CLASSES])
    np.testing.assert_array_equal(memory[0, :, 0], new.memory_NKPM[1])
    np.testing.assert_array_equal(memory[0, :, 1], new.memory_NKPM[0])


def test_draws_follow_the_softmax_of_the_similarity():
    new = images(4, SIZE)
    bank = remember_images(nothing(), new, jnp.ones(SIZE, bool))
    query = new.embedding_NE[:1]
    keys = jax.random.split(jax.random.key(0), 1)
    memory, valid = look_up(Recall(bank, 6000, keys), query)
    assert valid.all()
    entries = np.asarray(new.embedding_NE) / np.linalg.norm(new.embedding_NE, axis=1)[:, None]
    cosine = entries @ entries[0]
    expected = np.exp(cosine) / np.exp(cosine).sum()
    for k in range(CLASSES):
        same = [
            (np.asarray(memory[0, k]) == np.asarray(m)).all((1, 2)).mean()
            for m in new.memory_NKPM[:, k]
        ]
        np.testing.assert_allclose(same, expected, atol=0.03)


def test_an_empty_bank_is_no_memory():
    _, valid = look_up(
        Recall(nothing(), 2, jax.random.split(jax.random.key(0), 3)), jnp.ones((3, LENGTH))
    )
    assert not valid.any()
    _, valid = look_up(Recall(nothing(), 2, None), jnp.ones((3, LENGTH)))
    assert not valid.any()


@pytest.fixture(scope="module")
def trained(micro):
    """Loss, gradient and bank of a step with an empty bank, and of the step after it."""
    from sss_jax.ssl.weak_to_strong import sss_loss
    from sss_jax.train.state import init_all_params

    model, options, batch = micro
    memory = dataclasses.replace(options.memory, kind="self_sorting", capacity=4, samples=2)
    # One view, and nothing that has nothing to do with memory: half the time to compile.
    options = dataclasses.replace(
        options,
        memory=memory,
        dfe=dataclasses.replace(options.dfe, enabled=False),
        pcsw=dataclasses.replace(options.pcsw, enabled=False),
        semi=dataclasses.replace(options.semi, views=1, dropout=False, labelled_prompts="none"),
    )
    params = jax.jit(lambda k: init_all_params(model, options, k))(jax.random.key(0))

    @jax.jit
    def step(params, bank, batch):
        def of(params):
            return sss_loss(
                params,
                params["net"],
                batch,
                jax.random.key(1),
                jnp.int32(0),
                model=model,
                options=options,
                bank=ImageBank(**bank["bank"]),
            )

        return jax.value_and_grad(of, has_aux=True)(params)

    first = step(params, empty_bank(model, memory), batch)
    bank = first[0][1]["bank"]
    return params, batch, step, first, step(params, {"bank": bank._asdict()}, batch)


def test_the_step_fills_the_bank_and_then_looks_at_it(trained):
    _, _, _, ((loss, aux), _), ((next_loss, next_aux), _) = trained
    assert np.isfinite(loss)
    assert (aux["bank"].count_K == 4).all()
    assert aux["loss_labelled"] != next_aux["loss_labelled"], "labelled images see the old bank"
    assert np.isfinite(next_loss)


def test_gradients_reach_the_memory_encoder_through_the_strong_views(trained):
    grads = trained[3][1]["net"]["sam2"]
    for name in ("memory_encoder", "memory_attention"):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads[name])), name


def test_padding_never_enters(trained):
    params, batch, step, ((_, aux), _), _ = trained
    mask = batch["labelled"]["slice_mask"]
    garbage = {name: dict(part) for name, part in batch.items()}
    garbage["labelled"]["image"] = np.where(
        mask[..., None, None, None], batch["labelled"]["image"], 0.9
    ).astype(np.float32)
    empty = {"bank": jax.tree.map(jnp.zeros_like, aux["bank"])._asdict()}
    again = step(params, empty, garbage)[0][1]["bank"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, aux["bank"])
