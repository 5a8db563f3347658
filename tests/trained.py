"""A small network trained in a second: methods are tested on layers as training leaves them."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from jopt.layers._statistics import input_statistics

WIDTHS = (64, 48, 32, 8)


def images(key, count):
    """Draw smooth 8 by 8 images: their pixels are correlated, as those of photographs are."""
    waves = jnp.arange(8)[:, None] * jnp.arange(8)[None, :] * jnp.pi / 8
    basis = jnp.cos(waves + jnp.pi / 16 * jnp.arange(8)[:, None])
    spectrum = jax.random.normal(key, (count, 8, 8)) / (
        1 + jnp.arange(8)[None, :, None] + jnp.arange(8)[None, None, :]
    )
    return jnp.einsum("nij,ia,jb->nab", spectrum, basis, basis).reshape(count, 64)


def forward(params, inputs):
    """Return the inputs of each layer, and the logits."""
    seen = []
    for number in range(len(WIDTHS) - 1):
        seen.append(inputs)
        layer = params[f"dense{number}"]
        inputs = inputs @ layer["kernel"] + layer["bias"][None, :]
        inputs = jax.nn.relu(inputs) if number < len(WIDTHS) - 2 else inputs
    return seen, inputs


@lru_cache
def network():
    """Return trained parameters and statistics of the inputs of each kernel by path."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        f"dense{n}": {
            "kernel": jax.random.normal(keys[n], pair) * (2 / pair[0]) ** 0.5,
            "bias": jnp.zeros(pair[1]),
        }
        for n, pair in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))
    }
    data = images(keys[3], 2048)
    teacher = jax.random.normal(keys[4], (64, 8))
    labels = jnp.argmax(jnp.tanh(data @ teacher) + 0.5 * jnp.sin(3 * data[:, :8]), -1)
    tx = optax.adamw(5e-3, weight_decay=1e-2)

    def step(carry, index):
        params, state = carry

        def loss(p):
            logits = forward(p, data[index])[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    order = jax.random.randint(keys[5], (400, 64), 0, 2048)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, order)[0])
    params, _ = run((params, tx.init(params)))
    seen = forward(params, data)[0]
    statistics = {
        f"dense{n}/kernel": input_statistics.finalise(
            input_statistics.update(input_statistics.init(rows.shape[1]), rows)
        )
        for n, rows in enumerate(seen)
    }
    return params, statistics


def layers():
    """Return the kernels of the trained network, each with the statistics of its inputs."""
    params, statistics = network()
    return [(params[path.split("/")[0]]["kernel"], statistics[path]) for path in statistics]
