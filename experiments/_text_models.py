"""Networks that read sentences, in Flax linen: rows of word numbers in, logits out."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from experiments._text import PADDING, UNKNOWN


class SentenceFeatures(NamedTuple):
    """What a network says of sentences.

    Attributes:
      logits: (batch, classes).
      embedding: (batch, width), what the last layer sees.
    """

    logits: Array
    embedding: Array


class TextTransformer(nn.Module):
    """A transformer encoder with layer norm before every part, averaged over the words.

    Words beyond the vocabulary are read as unknown, so that a small network may know the most
    frequent words only.
    """

    num_classes: int
    vocabulary: int
    positions: int
    width: int
    layers: int
    heads: int
    hidden: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids: Array, train: bool = False) -> SentenceFeatures:
        """Map word numbers (batch, length) to logits and the vector they are made of."""
        real = ids != PADDING
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(embedded(ids, self.vocabulary, self.width))
        places = self.param("places", nn.initializers.normal(0.02), (1, self.positions, self.width))
        x = x + places[:, : ids.shape[1]]
        mask = nn.make_attention_mask(jnp.ones_like(real), real)
        for number in range(self.layers):
            name = f"layer{number}"
            y = nn.LayerNorm(name=f"{name}_attention_norm")(x)
            attention = nn.MultiHeadDotProductAttention(self.heads, name=f"{name}_attention")
            x = x + drop(attention(y, mask=mask))
            y = nn.LayerNorm(name=f"{name}_norm")(x)
            y = nn.gelu(nn.Dense(self.hidden, name=f"{name}_up")(y))
            x = x + drop(nn.Dense(self.width, name=f"{name}_down")(y))
        x = nn.LayerNorm(name="norm")(x)
        counts = jnp.maximum(real.sum(1, keepdims=True), 1)
        embedding = jnp.sum(x * real[..., None], 1) / counts
        logits = nn.Dense(self.num_classes, name="classifier")(drop(embedding))
        return SentenceFeatures(logits, embedding)


class TextCNN(nn.Module):
    """Convolutions over several numbers of words, the maximum over places, one dense layer.

    Kim, "Convolutional Neural Networks for Sentence Classification", 2014. A convolution is a dense
    layer on neighbouring words side by side, which is faster on a CPU.
    """

    num_classes: int
    vocabulary: int
    width: int
    filters: int
    sizes: Sequence[int] = (3, 4, 5)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids: Array, train: bool = False) -> SentenceFeatures:
        """Map word numbers (batch, length) to logits and the vector they are made of."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = drop(embedded(ids, self.vocabulary, self.width))
        x = x * (ids != PADDING)[..., None]
        found = []
        for size in self.sizes:
            length = x.shape[1] - size + 1
            side_by_side = jnp.concatenate([x[:, at : at + length] for at in range(size)], -1)
            y = nn.relu(nn.Dense(self.filters, name=f"conv{size}")(side_by_side))
            found.append(y.max(1))
        embedding = jnp.concatenate(found, -1)
        logits = nn.Dense(self.num_classes, name="classifier")(drop(embedding))
        return SentenceFeatures(logits, embedding)


def embedded(ids: Array, vocabulary: int, width: int) -> Array:
    """Return the vectors of words (batch, length, width); it belongs in a compact module."""
    known = jnp.where(ids < vocabulary, ids, UNKNOWN)
    return nn.Embed(vocabulary, width, name="words")(known)
