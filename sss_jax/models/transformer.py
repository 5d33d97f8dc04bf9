"""Two-way transformer between prompt tokens and image positions.

Source: SAM (Kirillov et al. 2023), appendix A.

Tokens are (B, K, N, D). Image keys are (B, J, P, D), where J is 1 while they are still the same
for all K objects and K afterwards, so that what the objects share is computed once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float
from sss_jax.models import layers
from sss_jax.models.attention import attention
from sss_jax.models.presets import Sam2Config

EPSILON = 1e-5


class Attention(nn.Module):
    """Multi-head attention with separate projections.

    Attributes:
        width: output channels.
        inner: channels inside, over all heads.
        heads: attention heads.
        dtype: computation type.
    """

    width: int
    inner: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B Kq N D"],
        k: Float[Array, "B Kk M D"],
        v: Float[Array, "B Kk M D"],
        valid: Bool[Array, "B Kk M"] | None = None,
    ) -> Float[Array, "B K N D"]:
        """Attend from `q` to the keys that are `valid`."""

        def project(x: Array, name: str) -> Array:
            y = layers.Dense(self.inner, self.dtype, name=name)(x)
            return layers.split_heads(y, self.heads)

        q, k, v = project(q, "q_proj"), project(k, "k_proj"), project(v, "v_proj")
        y = layers.merge_heads(attention(q, k, v, valid))
        return layers.Dense(self.width, self.dtype, name="out_proj")(y)


class TwoWayLayer(nn.Module):
    """Self-attention, token to image, MLP, image to token.

    Attributes:
        config: network shape.
        first: self-attention replaces the tokens instead of adding to them, without positions.
    """

    config: Sam2Config
    first: bool

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B K N D"],
        keys: Float[Array, "B J P D"],
        token_pe: Float[Array, "B K N D"],
        key_pe: Float[Array, "1 1 P D"],
        valid: Bool[Array, "B K N"],
    ) -> tuple[Float[Array, "B K N D"], Float[Array, "B K P D"]]:
        """Update tokens and image keys; unused tokens are no keys for anyone."""
        c = self.config
        dtype = c.compute_dtype

        def attend(name: str, downsample: int = c.attention_downsample) -> Attention:
            return Attention(c.width, c.width // downsample, c.decoder_heads, dtype, name=name)

        self_attention = attend("self_attn", 1)
        if self.first:
            tokens = self_attention(tokens, tokens, tokens, valid)
        else:
            placed = tokens + token_pe
            tokens = tokens + self_attention(placed, placed, tokens, valid)
        tokens = layers.LayerNorm(dtype, EPSILON, name="norm1")(tokens)

        placed_keys = keys + key_pe
        look = attend("cross_attn_token_to_image")(tokens + token_pe, placed_keys, keys)
        tokens = layers.LayerNorm(dtype, EPSILON, name="norm2")(tokens + look)

        mlp = layers.MLP((c.decoder_mlp, c.width), jax.nn.relu, dtype, name="mlp")
        tokens = layers.LayerNorm(dtype, EPSILON, name="norm3")(tokens + mlp(tokens))

        told = attend("cross_attn_image_to_token")(placed_keys, tokens + token_pe, tokens, valid)
        keys = layers.LayerNorm(dtype, EPSILON, name="norm4")(keys + told)
        return tokens, keys


class TwoWayTransformer(nn.Module):
    """Layers, then a last look of the tokens at the image.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B K N D"],
        keys: Float[Array, "B J P D"],
        key_pe: Float[Array, "1 1 P D"],
        valid: Bool[Array, "B K N"],
    ) -> tuple[Float[Array, "B K N D"], Float[Array, "B K P D"]]:
        """Return tokens and image keys; the input tokens serve as the tokens' positions."""
        c = self.config
        token_pe = tokens
        for i in range(c.decoder_depth):
            layer = TwoWayLayer(c, first=i == 0, name=f"layers_{i}")
            tokens, keys = layer(tokens, keys, token_pe, key_pe, valid)
        look = Attention(
            c.width,
            c.width // c.attention_downsample,
            c.decoder_heads,
            c.compute_dtype,
            name="final_attn_token_to_image",
        )(tokens + token_pe, keys + key_pe, keys)
        norm = layers.LayerNorm(c.compute_dtype, EPSILON, name="norm_final_attn")
        return norm(tokens + look), keys
