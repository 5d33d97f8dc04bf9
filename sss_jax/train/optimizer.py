"""AdamW in two parameter groups, its rates, and the teacher's moving average."""

import jax
import jax.numpy as jnp
import optax

from sss_jax.axes import Array, Float, Int, PyTree
from sss_jax.errors import ConfigError
from sss_jax.options import OptimizerOptions

__all__ = ["decays", "ema_update", "learning_rate", "make_optimizer", "parameter_groups"]

_ENCODER = "image_encoder"
_FROZEN = "positional_encoding_gaussian_matrix"


def _schedule(rate: float, options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Linear warm-up to `rate`, then decay that would reach 0 (poly, cosine) at `steps`."""
    warmup = options.warmup_steps

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        decay = {
            "poly": lambda: (1 - done) ** options.power,
            "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "constant": lambda: jnp.ones_like(done),
        }[options.schedule]()
        # The first step already moves: its rate is rate / warmup, not 0.
        warm = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        return rate * warm * decay

    return schedule


def learning_rate(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Make the learning rate of decoder and new parts as a function of the step.

    Args:
        options: rate, schedule, warm-up.
        steps: length of the run.

    Returns:
        A function from the step (from 0) to the rate; the encoder's is in the same proportion.
    """
    return _schedule(options.rate, options, steps)


def parameter_groups(params: PyTree) -> PyTree:
    """Name each parameter's group by its path: "encoder", "frozen" or "other"."""

    def group(path: tuple, _: Array) -> str:
        name = jax.tree_util.keystr(path)
        if _FROZEN in name:
            return "frozen"
        return "encoder" if _ENCODER in name else "other"

    return jax.tree_util.tree_map_with_path(group, params)


def decays(params: PyTree) -> PyTree:
    """Mark the parameters that weight decay shrinks: matrices and convolution kernels.

    The name decides, not the rank alone: tables of embeddings and stacked biases have two axes too.
    """

    def is_kernel(path: tuple, leaf: Array) -> bool:
        return jax.tree_util.keystr(path[-1:]).strip("[]'\".").endswith("kernel") and leaf.ndim >= 2

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def rate_factors(options: OptimizerOptions, params: PyTree) -> PyTree:
    """Factor of each parameter's rate, from entries such as `net/sam2/image_encoder/trunk=0.1`.

    Raises:
        ConfigError: an entry is not PATH=FACTOR, or no parameter lies below its path.
    """
    entries = [_parse_factor(entry) for entry in options.factors]
    used: set[str] = set()

    def factor(path: tuple, _: Array) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = 1.0
        for prefix, scale in entries:
            if f"{name}/".startswith(f"{prefix}/"):
                used.add(prefix)
                value *= scale
        return value

    factors = jax.tree_util.tree_map_with_path(factor, params)
    for prefix, _ in entries:
        if prefix not in used:
            first = sorted(params)[0]
            raise ConfigError(
                f"optimizer.factors: no parameter lies below {prefix!r}; paths look like "
                f"{first}/... (see docs/how-to/sam2-weights.md)"
            )
    return factors


def _parse_factor(entry: str) -> tuple[str, float]:
    prefix, _, number = entry.partition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if not prefix or not 0 <= factor < float("inf"):
        raise ConfigError(f"optimizer.factors: {entry!r} is not PATH=FACTOR with a factor from 0")
    return prefix.strip("/"), factor


def _with_standard_promotion(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Let optax mix floats and integers where the caller forbids implicit promotion."""

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None) -> tuple:
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(grads, state, params)

    return optax.GradientTransformation(transformation.init, update)


def make_optimizer(
    options: OptimizerOptions, steps: int, params: PyTree
) -> optax.GradientTransformation:
    """Make AdamW with clipping, weight decay on kernels, and a lower rate for the encoder.

    The gradient's norm is that of all trained parameters together. Parameters of the random
    positional encoding are constants of SAM 2 and never change.

    Args:
        options: rates, schedule, decay, clipping.
        steps: length of the run.
        params: the parameters, or their shapes; only paths and ranks are read.

    Returns:
        The gradient transformation; `update` needs the parameters.

    Raises:
        ConfigError: `factors` name something that is not there.

    Source: UniMatch V2 (Yang et al. 2024): AdamW, poly schedule, new parts 40 times as fast.
    """
    factors = rate_factors(options, params)
    groups = jax.tree.map(
        lambda group, factor: group if factor else "frozen", parameter_groups(params), factors
    )
    frozen = jax.tree.map(lambda group: group == "frozen", groups)
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    rates = {
        "other": optax.scale_by_learning_rate(_schedule(options.rate, options, steps)),
        "encoder": optax.scale_by_learning_rate(_schedule(options.encoder_rate, options, steps)),
        "frozen": optax.set_to_zero(),
    }
    chain = optax.chain(
        optax.masked(optax.set_to_zero(), frozen),
        clip,
        optax.scale_by_adam(b2=options.b2),
        optax.add_decayed_weights(options.weight_decay, mask=decays(params)),
        optax.multi_transform(rates, groups),
        *([_scale_each(factors)] if options.factors else []),
    )
    return _with_standard_promotion(chain)


def _scale_each(factors: PyTree) -> optax.GradientTransformation:
    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        return jax.tree.map(lambda u, f: u * f, updates, factors)

    return optax.stateless(update)


def ema_update(ema: PyTree, params: PyTree, step: Int[Array, ""] | int, decay: float) -> PyTree:
    """Move the teacher towards the student.

    Args:
        ema: the teacher's parameters.
        params: the student's parameters after the update.
        step: t, from 0.
        decay: largest weight of the old teacher.

    Returns:
        `a * ema + (1 - a) * params` with `a = min(1 - 1 / (t + 1), decay)`: the first step copies.

    Source: UniMatch V2 (Yang et al. 2024).
    """
    weight = jnp.minimum(1 - 1 / (jnp.asarray(step, jnp.float32) + 1), decay)

    def mix(old: Array, new: Array) -> Array:
        # As a difference: where teacher and student agree they agree exactly afterwards.
        return new + weight.astype(new.dtype) * (old - new)

    return jax.tree.map(mix, ema, params)
