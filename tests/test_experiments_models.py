"""The experiments' networks and training loop: sizes, equal formulations, shifts, no retracing."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _models, _train

FORMULATIONS = [
    (_models.conv_patches, _models.conv_direct),
    (_models.conv_pool_blocks, _models.conv_pool_direct),
]
SHAPES = [
    ((1, 28, 28, 3), (5, 5, 1, 4)),
    ((3, 16, 16, 2), (5, 5, 3, 4)),
    ((3, 13, 11, 2), (5, 5, 3, 2)),
    ((2, 11, 14, 2), (3, 5, 2, 4)),
    ((2, 9, 8, 2), (4, 4, 2, 3)),
    ((2, 5, 4, 2), (1, 1, 2, 3)),
]


def _count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _shapes(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]


def _draw(shape, number):
    # NumPy, because jax.random would compile once for every shape.
    values = np.random.default_rng(number).standard_normal(shape, np.float32)
    return jnp.asarray(values)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (_models.LeNet300100(), 266_610),
        (_models.LeNet5(), 431_080),
        (_models.StudentCNN(), 20_522),
    ],
)
def test_networks_have_the_parameters_they_should(model, count):
    assert _count(_shapes(model, (1, 28, 28, 1))) == count


@pytest.mark.parametrize(
    "network", [_models.LeNet300100, _models.LeNet5, _models.StudentCNN], ids=lambda n: n.__name__
)
def test_networks_take_other_images_and_classes(network):
    model = network(num_classes=7)
    images = jnp.zeros((3, 32, 32, 3))
    params = _shapes(model, images.shape)
    logits = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, images)
    assert logits.shape == (3, 7)


def test_lenet5_names_its_parameters_readably():
    shapes = jax.tree.map(lambda leaf: leaf.shape, _shapes(_models.LeNet5(), (1, 28, 28, 1)))
    assert shapes == {
        "conv1": {"kernel": (5, 5, 1, 20), "bias": (20,)},
        "conv2": {"kernel": (5, 5, 20, 50), "bias": (50,)},
        "dense1": {"kernel": (800, 500), "bias": (500,)},
        "dense2": {"kernel": (500, 10), "bias": (10,)},
    }


def _assert_same(function, reference, x_shape, kernel_shape):
    """Compare values and both gradients."""
    x, kernel = _draw(x_shape, 0), _draw(kernel_shape, 1)
    cotangent = _draw(jax.eval_shape(reference, x, kernel).shape, 2)

    def run(function):
        out, back = jax.vjp(function, x, kernel)
        return out, back(cotangent)

    actual, expected = jax.jit(lambda: (run(function), run(reference)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("function", "reference"), FORMULATIONS)
@pytest.mark.parametrize(("x_shape", "kernel_shape"), SHAPES)
def test_formulations_agree_with_lax(function, reference, x_shape, kernel_shape):
    _assert_same(function, reference, x_shape, kernel_shape)


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (_models.conv2d_valid, _models.conv_direct),
        (_models.conv_pool, _models.conv_pool_direct),
    ],
)
def test_the_chosen_formulations_agree_with_lax(function, reference):
    _assert_same(function, reference, (4, 12, 12, 3), (5, 5, 4, 6))


def test_direct_convolution_is_flax_convolution():
    x, kernel = _draw((3, 9, 8, 2), 0), _draw((3, 3, 3, 4), 1)
    flax = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)
    expected = flax.apply({"params": {"kernel": kernel}}, x.transpose(3, 1, 2, 0))
    actual = _models.conv_direct(x, kernel).transpose(3, 1, 2, 0)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 9, 2)])
def test_pool_agrees_with_flax(shape):
    def flax_pool(x):
        return nn.max_pool(x.transpose(3, 1, 2, 0), (2, 2), (2, 2)).transpose(3, 1, 2, 0)

    # Few distinct values, so that there are ties: both give the gradient to the first of them in
    # a row, and to the first row.
    x = jnp.round(_draw(shape, 0))
    out, back = jax.vjp(_models.max_pool, x)
    expected, expected_back = jax.vjp(flax_pool, x)
    cotangent = _draw(out.shape, 1)
    chex.assert_trees_all_equal(out, expected)
    chex.assert_trees_all_close(back(cotangent), expected_back(cotangent))


def test_pooled_convolution_maps_over_kernels():
    x, kernels = _draw((2, 8, 8, 3), 0), _draw((4, 3, 3, 2, 5), 1)
    mapped = jax.jit(jax.vmap(_models.conv_pool_blocks, (None, 0)))(x, kernels)
    direct = jax.jit(_models.conv_pool_direct)
    for result, kernel in zip(mapped, kernels, strict=True):
        chex.assert_trees_all_close(result, direct(x, kernel), rtol=1e-4, atol=1e-4)


def _problem():
    """Return a small network's loss, first parameters, images and labels."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (40, 12, 12, 1), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, 40, dtype=np.int32))
    model = _models.LeNet5(filters=(3,), hidden=8)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12, 12, 1)))["params"]

    def loss(params, images, labels, key, extras):
        logits: Any = model.apply({"params": params}, images)
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return hard if extras is None else hard + jnp.mean((logits - extras) ** 2)

    return loss, params, images, labels


def test_scanned_and_dispatched_epochs_agree():
    loss, params, images, labels = _problem()
    tx = optax.adam(1e-3)
    step = _train.make_step(loss, tx, augment=partial(_train.random_shift, max_shift=2))
    order = jnp.arange(40).reshape(5, 8)
    results = []
    for loop in (_train.scan_steps, _train.dispatch_steps):
        carry = _train.start(params, tx, jax.random.key(2))
        carry, losses = _train.run_epoch(step, carry, images, labels, order, loop=loop)
        assert losses.shape == (5,)
        results.append((carry.params, losses))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
    assert not np.allclose(results[0][0]["conv1"]["kernel"], params["conv1"]["kernel"])


@pytest.mark.parametrize("loop", [_train.scan_steps, _train.dispatch_steps])
def test_epochs_do_not_retrace(loop):
    loss, params, images, labels = _problem()
    tx = optax.adam(1e-3)
    chex.clear_trace_counter()
    counted: Any = chex.assert_max_traces(loss, 1)
    step = _train.make_step(counted, tx)
    carry = _train.start(params, tx, jax.random.key(2))
    for epoch in range(3):
        order = (jnp.arange(40).reshape(5, 8) + epoch) % 40
        carry, _ = _train.run_epoch(step, carry, images, labels, order, loop=loop)


def test_extras_reach_the_loss_whole_or_by_row():
    loss, params, images, labels = _problem()
    tx = optax.sgd(0.1)
    logits = _draw((len(labels), 10), 3)
    index = jnp.arange(6, 14)
    by_row = _train.make_step(loss, tx, select=_train.rows)
    whole = _train.make_step(loss, tx)
    carry = _train.start(params, tx, jax.random.key(2))
    _, value = by_row(carry, images, labels, index, logits)
    carry = _train.start(params, tx, jax.random.key(2))
    _, expected = whole(carry, images, labels, index, logits[index])
    assert value == pytest.approx(float(expected), rel=1e-6)


def test_epoch_order_visits_each_example_at_most_once():
    order = np.asarray(_train.epoch_order(jax.random.key(0), 23, 5))
    assert order.shape == (4, 5)
    assert len(set(order.ravel().tolist())) == 20
    assert order.min() >= 0 and order.max() < 23


@pytest.mark.parametrize("batch", [4, 10, 100])
def test_accuracy_is_an_exact_count(batch):
    scores = np.asarray(_draw((10, 5, 1, 1), 0))
    labels = np.argmax(scores.reshape(10, 5), -1)
    labels[:3] = (labels[:3] + 1) % 5

    def apply(params, images):
        return params * images.reshape(len(images), -1)

    arguments = (jnp.float32(2), jnp.asarray(scores), jnp.asarray(labels), batch)
    assert _train.accuracy(apply, *arguments) == 0.7
    assert _train.error_rate(apply, *arguments) == 0.3


def test_normalize_takes_bytes_to_the_unit_interval():
    pixels = jnp.asarray([0, 51, 255], jnp.uint8)
    chex.assert_trees_all_close(_train.normalize(pixels), jnp.asarray([0.0, 0.2, 1.0]))
    assert _train.normalize(jnp.asarray([3.0])) == 3.0


def _moved(image, down, right):
    """Shift one image with zeros coming in, the slow and plain way."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[row, column] = image[row - down, column - right]
    return result


def test_random_shift_moves_each_image_and_fills_with_zeros(variant):
    images = np.random.default_rng(0).integers(1, 256, (64, 6, 5, 2), dtype=np.uint8)
    shift = variant(partial(_train.random_shift, max_shift=2))
    shifted = np.asarray(shift(jax.random.key(0), jnp.asarray(images)))
    assert shifted.dtype == np.uint8
    seen = set()
    for image, result in zip(images, shifted, strict=True):
        moves = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if np.array_equal(result, _moved(image, down, right))
        ]
        assert len(moves) == 1
        seen.add(moves[0])
    assert {down for down, _ in seen} == {right for _, right in seen} == {-2, -1, 0, 1, 2}


def test_random_shift_by_nothing_changes_nothing():
    images = jnp.arange(2 * 4 * 3, dtype=jnp.uint8).reshape(2, 4, 3, 1)
    chex.assert_trees_all_equal(_train.random_shift(jax.random.key(0), images, 0), images)
