"""A decoder-only transformer: it reads tokens and says which comes next.

Layer norms stand before attention and before the two dense layers, places are learned, and the
table of tokens serves both ends. Generation keeps the keys and values of what was read in a
`Cache`, a tree like any other, so that each further token costs one pass over one token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Tree = Any


class Cache(NamedTuple):
    """What attention keeps of the tokens that were read, laid out as its products read it.

    Attributes:
      keys: of each layer, (batch * heads, width of a head, positions).
      values: of each layer, (batch * heads, positions, width of a head).
      length: how many tokens were read, a scalar.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array


class Decoder(nn.Module):
    """The transformer; by default 3.8 million parameters, a seventh of them the table of tokens.

    Parameters are `tokens/embedding`, `places`, and for each layer `layer0_attention_norm`,
    `layer0_query`, `layer0_key`, `layer0_value`, `layer0_out`, `layer0_norm`, `layer0_up` and
    `layer0_down`, all kernels (inputs, outputs); `norm` comes last.
    """

    vocabulary: int = 2048
    positions: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 1024
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, ids: Array, cache: Cache | None = None, train: bool = False
    ) -> tuple[Array, Cache | None]:
        """Map tokens to the logits of those that follow.

        Args:
          ids: whole numbers below `vocabulary`, (batch, tokens).
          cache: of the tokens before these; None if there are none, and none is to be kept. It has
            room for all tokens that are still to come.
          train: whether to drop out.

        Returns:
          Logits (batch, tokens, vocabulary), and the cache with these tokens in it.
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        init = nn.initializers.normal(0.02)
        table = nn.Embed(self.vocabulary, self.width, embedding_init=init, name="tokens")
        places = self.param("places", init, (self.positions, self.width))
        start = jnp.int32(0) if cache is None else cache.length
        x = table(ids) + lax.dynamic_slice_in_dim(places, start, ids.shape[1])[None]
        x = drop(x)
        kept_keys, kept_values = [], []
        for number in range(self.layers):
            name = f"layer{number}"
            y = nn.LayerNorm(name=f"{name}_attention_norm")(x)
            query, key, value = (
                nn.Dense(self.width, name=f"{name}_{part}")(y).reshape(*y.shape[:2], self.heads, -1)
                for part in ("query", "key", "value")
            )
            query, key, value = (by_head(each) for each in (query, key, value))
            key = key.swapaxes(1, 2)
            if cache is not None:
                key = lax.dynamic_update_slice_in_dim(cache.keys[number], key, start, 2)
                value = lax.dynamic_update_slice_in_dim(cache.values[number], value, start, 1)
                kept_keys.append(key)
                kept_values.append(value)
            mixed = attend(query, key, value, start).reshape(len(ids), self.heads, *query.shape[1:])
            y = mixed.swapaxes(1, 2).reshape(y.shape)
            x = x + drop(nn.Dense(self.width, name=f"{name}_out")(y))
            y = nn.LayerNorm(name=f"{name}_norm")(x)
            y = nn.gelu(nn.Dense(self.hidden, name=f"{name}_up")(y))
            x = x + drop(nn.Dense(self.width, name=f"{name}_down")(y))
        logits = table.attend(nn.LayerNorm(name="norm")(x))
        if cache is None:
            return logits, None
        return logits, Cache(tuple(kept_keys), tuple(kept_values), start + ids.shape[1])

    def empty(self, batch: int, positions: int | None = None) -> Cache:
        """Return a cache with room for some tokens, by default for all that have a place."""
        room = self.positions if positions is None else positions
        wide = self.width // self.heads
        keys = tuple(jnp.zeros((batch * self.heads, wide, room)) for _ in range(self.layers))
        values = tuple(jnp.zeros((batch * self.heads, room, wide)) for _ in range(self.layers))
        return Cache(keys, values, jnp.int32(0))


def by_head(values: Array) -> Array:
    """Turn (batch, tokens, heads, size) into (batch * heads, tokens, size)."""
    return values.swapaxes(1, 2).reshape(-1, values.shape[1], values.shape[3])


def attend(query: Array, key: Array, value: Array, start: Array) -> Array:
    """Mix the values of what comes no later, (batch * heads, tokens, width of a head).

    `softmax(q k^T / sqrt(d)) v`, a token at place `start + i` seeing places 0 to `start + i`.

    Args:
      query: (batch * heads, tokens, width of a head).
      key: (batch * heads, width of a head, places), place 0 first.
      value: (batch * heads, places, width of a head).
      start: place of the first query, a scalar.
    """
    scores = query @ key / jnp.sqrt(jnp.float32(query.shape[-1]))
    seen = jnp.arange(key.shape[2])[None] <= start + jnp.arange(query.shape[1])[:, None]
    scores = jnp.where(seen[None], scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores) @ value


Choose = Callable[[Array, Array], Array]


def likeliest(key: Array, logits: Array) -> Array:
    """Choose the likeliest token, (batch,)."""
    return jnp.argmax(logits, -1)


def drawn(key: Array, logits: Array) -> Array:
    """Draw a token as likely as the network says, (batch,)."""
    return jax.random.categorical(key, logits)


@partial(jax.jit, static_argnames=("module", "count", "choose"))
def generate(
    module: Decoder,
    params: Tree,
    prompt: Array,
    count: int,
    key: Array | None = None,
    choose: Choose = likeliest,
) -> Array:
    """Continue prompts, one token after the other, each at the cost of one pass over one token.

    Args:
      module: the network.
      params: its parameters, materialized.
      prompt: (batch, tokens), at least one.
      count: tokens to add; with the prompt no more than there are places.
      key: of the draws, if there are any.
      choose: from a key and logits (batch, vocabulary) to tokens: `likeliest` or `drawn`.

    Returns:
      The continuations, (batch, count).

    Raises:
      ValueError: prompt and continuation together are longer than there are places.
    """
    total = prompt.shape[1] + count
    if total > module.positions:
        raise ValueError(
            f"prompt and count must fit {module.positions} places together, not {total}."
        )
    keys = jax.random.split(jax.random.key(0) if key is None else key, count)

    def read(ids: Array, cache: Cache | None) -> tuple[Array, Cache | None]:
        logits, cache = module.apply({"params": params}, ids, cache)  # pyright: ignore
        return logits[:, -1], cache

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        logits, cache = carry
        token = choose(key, logits).astype(prompt.dtype)
        return read(token[:, None], cache), token

    first = read(prompt, module.empty(len(prompt), total))
    carry, tokens = lax.scan(step, first, keys[:-1])
    last = choose(keys[-1], carry[0]).astype(prompt.dtype)
    return jnp.concatenate([tokens, last[None]]).T
