"""Memory bank of a tracked volume: fixed-size arrays, in and out of pure functions.

Every object has `C` slots for slices that somebody prompted, and a ring of slots for the slices
tracked last. A slot knows the slice it came from; -1 means empty. What a slot means to the slice
at hand follows from the two slice numbers and the direction alone, so the bank has the same shape
for volumes of any length.

Source: SAM 2 (Ravi et al. 2024), sections 4 and D.

Axes: B volumes, K objects, L memory slots, R pointer slots, P positions, M channels of a memory, D
channels of a pointer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int
from sss_jax.models.presets import Sam2Config

EMPTY = -1


class MemoryBank(NamedTuple):
    """Memories of K objects; the first C slots of each kind belong to prompted slices.

    Attributes:
        memory_BKLPM: encoded masks on the coarse grid.
        memory_slice_BKL: slice of each memory; -1: empty.
        pointer_BKRD: object pointers.
        pointer_slice_BKR: slice of each pointer; -1: empty.
    """

    memory_BKLPM: Float[Array, "B K L P M"]
    memory_slice_BKL: Int[Array, "B K L"]
    pointer_BKRD: Float[Array, "B K R D"]
    pointer_slice_BKR: Int[Array, "B K R"]

    def conditioning(self, config: Sam2Config) -> int:
        """C, slots for prompted slices."""
        return self.pointer_BKRD.shape[2] - (config.max_pointers - 1)


class Memory(NamedTuple):
    """What one slice leaves behind.

    Attributes:
        memory_BKPM: encoded mask.
        pointer_BKD: object pointer.
    """

    memory_BKPM: Float[Array, "B K P M"]
    pointer_BKD: Float[Array, "B K D"]


def empty_bank(
    config: Sam2Config,
    batch: int,
    objects: int,
    positions: int,
    conditioning: int,
    slices: int | None = None,
) -> MemoryBank:
    """Return a bank that remembers nothing.

    Args:
        config: network shape.
        batch: B, volumes.
        objects: K.
        positions: P, cells of the coarse grid.
        conditioning: C, prompted slices per object that must fit.
        slices: most slices of a volume, if that is known: a short one fills a shorter ring.
    """
    # One slice at least is prompted. Of the others the first and the last share a slot in a ring
    # of S - 1, but nothing is visited after the second of them.
    ring = config.num_maskmem - 1 if slices is None else _short_ring(config, slices)
    slots = conditioning + ring
    pointers = conditioning + config.max_pointers - 1
    dtype = config.compute_dtype
    return MemoryBank(
        jnp.zeros((batch, objects, slots, positions, config.memory_width), dtype),
        jnp.full((batch, objects, slots), EMPTY, jnp.int32),
        jnp.zeros((batch, objects, pointers, config.width), dtype),
        jnp.full((batch, objects, pointers), EMPTY, jnp.int32),
    )


def bank_of(
    config: Sam2Config, past: Sequence[Memory], slices_BKL: Int[Array, "B K L"]
) -> MemoryBank:
    """Return the bank of what one slice after the other left, with room for no other memories.

    Args:
        config: network shape.
        past: what they left, that of the one prompted slice first; at most as many as `reach` takes
            pointers of.
        slices_BKL: slice number of each.
    """
    memories, pointers = zip(*past, strict=True)
    free = ((0, 0), (0, 0), (0, config.max_pointers - len(past)))
    return MemoryBank(
        jnp.stack(memories, axis=2),
        slices_BKL,
        jnp.pad(jnp.stack(pointers, axis=2), (*free, (0, 0))),
        jnp.pad(slices_BKL, free, constant_values=EMPTY),
    )


def _short_ring(config: Sam2Config, slices: int) -> int:
    return max(1, min(config.num_maskmem - 1, slices - 1))


def _put(values: Array, slices_BKS: Array, new: Array, at_BK: Array, index_BK1: Array) -> tuple:
    """Write `new` and its slice number into slot `at_BK`; a slot of -1 writes nothing."""
    hit_BKS = jnp.arange(slices_BKS.shape[2])[None, None] == at_BK[..., None]
    wide = hit_BKS.reshape(*hit_BKS.shape, *(1,) * (values.ndim - 3))
    return jnp.where(wide, new[:, :, None], values), jnp.where(hit_BKS, index_BK1, slices_BKS)


def _per_object(bank: MemoryBank, value: Array) -> Int[Array, "B K 1"]:
    """Lay out one number for all objects, or one for each, beside the slots."""
    return jnp.broadcast_to(value, bank.memory_slice_BKL.shape[:2])[..., None]


def remember_prompted(
    bank: MemoryBank,
    config: Sam2Config,
    new: Memory,
    index: Int[Array, "*BK"],
    where_BK: Bool[Array, "B K"],
) -> MemoryBank:
    """Store a prompted slice for the objects in `where_BK`, over what it left there before.

    `index` is one slice number for all objects, or one for each.

    Where all C slots hold other slices the oldest of them (the one with the smallest slice number)
    gives way; make the bank large enough and it never happens.
    """
    count = bank.conditioning(config)
    held_BKC = bank.memory_slice_BKL[:, :, :count]
    same, free = held_BKC == _per_object(bank, index), held_BKC == EMPTY
    # The slot of this slice wins over a free one, a free one over the slot with the least slice.
    order = jnp.where(same, -2, jnp.where(free, EMPTY, held_BKC))
    at_BK = jnp.where(where_BK, jnp.argmin(order, axis=-1), -1)
    return _store(bank, new, at_BK, at_BK, index)


def remember_tracked(
    bank: MemoryBank,
    config: Sam2Config,
    new: Memory,
    index: Int[Array, "*BK"],
    memory_where_BK: Bool[Array, "B K"],
    pointer_where_BK: Bool[Array, "B K"],
) -> MemoryBank:
    """Store a tracked slice where asked for; each ring's oldest slice gives way.

    `index` is one slice number for all objects, or one for each.
    """
    count = bank.conditioning(config)
    memory = count + index % (bank.memory_BKLPM.shape[2] - count)
    pointer = count + index % (config.max_pointers - 1)
    memory_BK = jnp.where(memory_where_BK, memory, -1)
    pointer_BK = jnp.where(pointer_where_BK, pointer, -1)
    return _store(bank, new, memory_BK, pointer_BK, index)


def _store(
    bank: MemoryBank, new: Memory, memory_BK: Array, pointer_BK: Array, index: Array
) -> MemoryBank:
    at = _per_object(bank, index)
    memory = _put(bank.memory_BKLPM, bank.memory_slice_BKL, new.memory_BKPM, memory_BK, at)
    pointer = _put(bank.pointer_BKRD, bank.pointer_slice_BKR, new.pointer_BKD, pointer_BK, at)
    return MemoryBank(*memory, *pointer)


class TwoWays(NamedTuple):
    """A bank for the way out from a start, and the one that the way back begins with.

    Rings forget the slices next to the start on the way out, where the way back meets them again.

    Attributes:
        bank: what is remembered now.
        turn: what the way back begins with.
    """

    bank: MemoryBank
    turn: MemoryBank


def turn_back(ways: TwoWays, now_BK: Bool[Array, "#B #K"]) -> TwoWays:
    """Go on with the bank of the way back for the objects that turn now."""

    def pick(current: Array, turn: Array) -> Array:
        now = now_BK.reshape(*now_BK.shape, *(1,) * (current.ndim - 2))
        return jnp.where(now, turn, current)

    return ways._replace(bank=MemoryBank(*map(pick, ways.bank, ways.turn)))


def remember_on_the_way(
    ways: TwoWays,
    config: Sam2Config,
    new: Memory,
    index: Int[Array, "*BK"],
    where_BK: Bool[Array, "B K"],
    gone: Int[Array, ""],
    backwards: Bool[Array, "*BK"],
) -> TwoWays:
    """Store a tracked slice; `gone` counts the steps since the start, 0 for the start itself."""
    early_BK = where_BK & ~jnp.broadcast_to(backwards, where_BK.shape) & (gone > 0)
    near, nearer = gone < config.max_pointers, gone < config.num_maskmem
    return TwoWays(
        remember_tracked(ways.bank, config, new, index, where_BK, where_BK),
        remember_tracked(ways.turn, config, new, index, early_BK & nearer, early_BK & near),
    )


class Reach(NamedTuple):
    """What the slice at hand may look at.

    Attributes:
        memory_valid_BKL: memories that take part.
        memory_age_BKL: row of the temporal table for each memory.
        pointer_valid_BKR: pointers that take part.
        pointer_distance_BKR: distance of each pointer, as a share of the pointers' reach.
    """

    memory_valid_BKL: Bool[Array, "B K L"]
    memory_age_BKL: Int[Array, "B K L"]
    pointer_valid_BKR: Bool[Array, "B K R"]
    pointer_distance_BKR: Float[Array, "B K R"]


def reach(
    bank: MemoryBank,
    config: Sam2Config,
    index: Int[Array, "*BK"],
    num_slices: Int[Array, "*BK"],
    backwards: Bool[Array, "*BK"],
) -> Reach:
    """Decide what slice `index` of a volume of `num_slices` looks at.

    Each of the three numbers is one for all objects, or one for each.

    All prompted slices, wherever they are, with the last row of the temporal table; of the tracked
    ones those up to 6 behind; pointers of prompted slices that are not ahead, and of tracked ones
    up to 15 behind, fewer in shorter volumes.
    """
    count = bank.conditioning(config)
    index, num_slices = _per_object(bank, index), _per_object(bank, num_slices)
    sign = jnp.where(_per_object(bank, backwards), -1, 1)
    memory, pointer = bank.memory_slice_BKL, bank.pointer_slice_BKR
    behind_BKL, behind_BKR = (index - memory) * sign, (index - pointer) * sign
    prompted_L = jnp.arange(memory.shape[2])[None, None] < count
    prompted_R = jnp.arange(pointer.shape[2])[None, None] < count
    recent_BKL = (behind_BKL >= 1) & (behind_BKL < config.num_maskmem)
    most = jnp.minimum(num_slices, config.max_pointers) - 1
    recent_BKR = (behind_BKR >= 1) & (behind_BKR <= most)
    last = config.num_maskmem - 1
    return Reach(
        (memory != EMPTY) & (prompted_L | recent_BKL),
        jnp.where(prompted_L, last, jnp.clip(behind_BKL - 1, 0, last)),
        (pointer != EMPTY) & jnp.where(prompted_R, behind_BKR >= 0, recent_BKR),
        behind_BKR / jnp.maximum(most, 1),
    )
