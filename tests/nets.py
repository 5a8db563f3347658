"""Small networks of the kinds that shrinking must know: residual, inverted residual, attention."""

import jax
import jax.numpy as jnp
from flax import linen, nnx


class Residual(linen.Module):
    """Two residual blocks, a strided one with padded channels, a concatenation, groups."""

    @linen.compact
    def __call__(self, images):
        x = self.normed(linen.Conv(8, (3, 3))(images))
        y = self.normed(linen.Conv(6, (3, 3))(x))
        x = linen.relu(x + self.normed(linen.Conv(8, (3, 3))(y), act=lambda y: y))
        y = linen.Conv(12, (3, 3), strides=2)(x)
        x = linen.relu(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 4))))
        x = jnp.concatenate([x, linen.relu(linen.Conv(4, (1, 1))(x))], -1)
        x = linen.relu(linen.Conv(16, (3, 3), feature_group_count=4)(x))
        x = linen.avg_pool(x, (2, 2), (2, 2))
        return linen.Dense(3)(x.reshape(len(x), -1))

    def normed(self, x, act=linen.relu):
        return act(linen.BatchNorm(use_running_average=True)(x))


class InvertedResidual(linen.Module):
    """EfficientNet's blocks: expand, depthwise, squeeze and excite, project."""

    @linen.compact
    def __call__(self, images):
        x = linen.relu6(linen.Conv(6, (3, 3), strides=2)(images))
        for _ in range(2):
            y = linen.relu6(self.norm(linen.Conv(12, (1, 1), use_bias=False)(x)))
            y = linen.Conv(12, (3, 3), feature_group_count=12, use_bias=False)(y)
            y = linen.silu(self.norm(y))
            gate = linen.relu(linen.Dense(5)(y.mean((1, 2), keepdims=True)))
            y = y * linen.sigmoid(linen.Dense(12)(gate))
            x = x + self.norm(linen.Conv(6, (1, 1), use_bias=False)(y))
        return linen.Dense(3)(x.mean((1, 2)))

    def norm(self, x):
        return linen.BatchNorm(use_running_average=True)(x)


class Encoder(linen.Module):
    """A BERT: tied embeddings, attention, GELU, layer norms after the residual."""

    @linen.compact
    def __call__(self, ids):
        embed = linen.Embed(20, 12, name="embed")
        x = embed(ids) + self.param("position", linen.initializers.normal(), (1, 5, 12))
        for layer in range(2):
            attention = linen.MultiHeadDotProductAttention(num_heads=3, name=f"attention_{layer}")
            x = linen.LayerNorm(name=f"norm_{layer}_0")(x + attention(x))
            y = linen.gelu(linen.Dense(16, name=f"up_{layer}")(x))
            y = linen.Dense(12, name=f"down_{layer}")(y)
            x = linen.LayerNorm(name=f"norm_{layer}_1")(x + y)
        return embed.attend(x)


class NnxResidual(nnx.Module):
    """A residual network in nnx, its batch norms included."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.inner = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.outer = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8 * 6 * 6, 3, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.first(images)))
        x = x + self.outer(nnx.relu(self.inner(x)))
        return self.head(nnx.max_pool(x, (1, 1)).reshape(len(x), -1))


def scanned_layers(params, x):
    """Fuse query, key and value; scan over the layers, recomputing them in the backward pass."""

    def layer(x, weights):
        mixed = (x @ weights["qkv"]).reshape(*x.shape[:2], 3, 4, 3)
        query, key, value = (mixed[:, :, i] for i in range(3))
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / 3**0.5
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)
        x = x + out.reshape(*x.shape[:2], -1) @ weights["out"]
        return x + jax.nn.silu(x @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return x @ params["head"]


@jax.jit
def _scattered(params, key):
    """Give every parameter values of its own, so that nothing is zero or one by chance."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(
        treedef, [leaf + 0.2 * jax.random.uniform(key, leaf.shape) for leaf, key in pairs]
    )


def _linen(model, x):
    params = jax.jit(model.init)(jax.random.key(0), x)
    return (lambda params, x: model.apply(params, x)), _scattered(params, jax.random.key(1)), x


def _nnx(x):
    graph, params = nnx.split(NnxResidual(nnx.Rngs(0)))
    return (lambda params, x: nnx.merge(graph, params)(x)), params, x


def _scanned():
    shapes = {"qkv": (8, 36), "out": (12, 8), "up": (8, 10), "down": (10, 8)}
    params = {"layers": {name: jnp.zeros((2, *shape)) for name, shape in shapes.items()}}
    params = _scattered(params | {"head": jnp.zeros((8, 3))}, jax.random.key(2))
    return scanned_layers, params, jax.random.normal(jax.random.key(3), (2, 5, 8))


def _images(size):
    return jax.random.normal(jax.random.key(4), (2, size, size, 1))


# (apply, params, batch), made when asked for.
NETS = {
    "residual": lambda: _linen(Residual(), _images(8)),
    "inverted": lambda: _linen(InvertedResidual(), _images(8)),
    "encoder": lambda: _linen(Encoder(), jnp.arange(10).reshape(2, 5)),
    "nnx": lambda: _nnx(_images(6)),
    "scanned": _scanned,
}
