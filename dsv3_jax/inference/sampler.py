"""Which token comes next: greedy, temperature, nucleus."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float = 1.0,
    top_p: Float[Array, ""] | float = 1.0,
) -> Int[Array, " B"]:
    """One token a row from float32 logits.

    A row's draw depends on the key, on its place in the batch and on its logits, not on how many rows there are.

    Args:
        logits: float32.
        key: one key a call; the same key draws the same tokens.
        temperature: what logits are divided by; 0 takes the best token and neither key nor ``top_p`` matters.
        top_p: share of the probability, after the temperature, that is kept; 1 keeps all.
    """

    def draw() -> Int[Array, " B"]:
        # The best logit becomes 0 first, so that the smallest temperature cannot make two infinities.
        scaled_BV = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        kept_BV = lax.cond(top_p < 1, lambda: keep_nucleus(scaled_BV, top_p), lambda: scaled_BV)
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)

    return lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def keep_nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Logits with minus infinity outside the nucleus: the fewest best tokens whose probabilities reach ``top_p``.

    The best token always stays. Of equal tokens those of lower ids come first.
    """
    order_BV = jnp.argsort(-logits, axis=-1, stable=True)
    p_BV = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    keep_BV = (before_BV < top_p).at[:, 0].set(True)
    rows_B1 = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(keep_BV).at[rows_B1, order_BV].set(keep_BV), logits, -jnp.inf)
