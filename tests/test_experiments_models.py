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

from experiments import _convolution, _models, _train

FORMULATIONS = [
    (_convolution.conv_windows_blocks, _convolution.conv_windows_direct),
    (_convolution.conv_pool_blocks, _convolution.conv_pool_direct),
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
        (_models.BatchNormCNN(), 256_954),
        (_models.BatchNormCNN(normalize=None), 256_554),
        (_models.ResidualCNN(), 173_298),
        (_models.LeNet5(filters=(6, 16), hidden=(120, 84)), 44_426),
    ],
)
def test_networks_have_the_parameters_they_should(model, count):
    assert _count(_shapes(model, (1, 28, 28, 1))) == count


@pytest.mark.parametrize(
    "network",
    [_models.LeNet300100, _models.LeNet5, _models.StudentCNN, _models.BatchNormCNN],
    ids=lambda n: n.__name__,
)
def test_networks_take_other_images_and_classes(network):
    model = network(num_classes=7)
    images = jnp.zeros((3, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, variables, images).shape == (3, 7)


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
        (_convolution.conv_windows, _convolution.conv_windows_direct),
        (_convolution.conv_pool, _convolution.conv_pool_direct),
    ],
)
def test_the_chosen_formulations_agree_with_lax(function, reference):
    _assert_same(function, reference, (4, 12, 12, 3), (5, 5, 4, 6))


def test_direct_convolution_is_flax_convolution():
    x, kernel = _draw((3, 9, 8, 2), 0), _draw((3, 3, 3, 4), 1)
    flax = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)
    expected = flax.apply({"params": {"kernel": kernel}}, x.transpose(3, 1, 2, 0))
    actual = _convolution.conv_direct(x, kernel).transpose(3, 1, 2, 0)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 9, 2)])
def test_pool_agrees_with_flax(shape):
    def flax_pool(x):
        return nn.max_pool(x.transpose(3, 1, 2, 0), (2, 2), (2, 2)).transpose(3, 1, 2, 0)

    # Few distinct values, so that there are ties: both give the gradient to the first of them in
    # a row, and to the first row.
    x = jnp.round(_draw(shape, 0))
    out, back = jax.vjp(_convolution.max_pool, x)
    expected, expected_back = jax.vjp(flax_pool, x)
    cotangent = _draw(out.shape, 1)
    chex.assert_trees_all_equal(out, expected)
    chex.assert_trees_all_close(back(cotangent), expected_back(cotangent))


def test_pooled_convolution_maps_over_kernels():
    x, kernels = _draw((2, 8, 8, 3), 0), _draw((4, 3, 3, 2, 5), 1)
    mapped = jax.jit(jax.vmap(_convolution.conv_pool_blocks, (None, 0)))(x, kernels)
    direct = jax.jit(_convolution.conv_pool_direct)
    for result, kernel in zip(mapped, kernels, strict=True):
        chex.assert_trees_all_close(result, direct(x, kernel), rtol=1e-4, atol=1e-4)


def test_members_of_windows_are_those_of_the_convolution_in_reading_order():
    x, kernel = _draw((2, 7, 9, 3), 0), _draw((3, 3, 2, 4), 1)
    plain = np.asarray(_convolution.conv_direct(x, kernel))
    members = np.asarray(_convolution.conv_windows_direct(x, kernel))
    places = [plain[:, i:4:2, j:6:2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(members, np.stack(places))
    np.testing.assert_array_equal(_convolution.largest(jnp.asarray(members)), np.max(places, 0))


def _normalized_by_flax(x, train, name):
    norm = nn.BatchNorm(use_running_average=not train, axis=1, momentum=0.9, name=name)
    return norm(x)


SMALL = {"filters": (3, 4, 5), "hidden": 6}


def _small_network():
    """Return variables whose scales have both signs and whose averages are no zeros and ones."""
    images = jnp.abs(_draw((6, 16, 16, 1), 0))
    shapes = jax.eval_shape(_models.BatchNormCNN(**SMALL).init, jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [0.5 * _draw(leaf.shape, number) for number, leaf in enumerate(leaves, 1)]
    variables = jax.tree.unflatten(tree, drawn)
    for statistics in variables["batch_stats"].values():
        statistics["var"] = jnp.abs(statistics["var"]) + 0.1
    for layer in ("conv1", "conv2", "conv3", "dense1"):
        scale = variables["params"][f"{layer}_norm"]["scale"]
        variables["params"][f"{layer}_norm"]["scale"] = jnp.abs(scale).at[1].multiply(-1.0)
    return variables, images


def _folded(variables):
    """Fold batch norm into the kernels before it, in float64."""
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, folded = exact["params"], {"dense2": exact["params"]["dense2"]}
    for layer in ("conv1", "conv2", "conv3", "dense1"):
        norm, running = params[f"{layer}_norm"], exact["batch_stats"][f"{layer}_norm"]
        factor = norm["scale"] / np.sqrt(running["var"] + 1e-5)
        bias = norm["bias"] - running["mean"] * factor
        folded[layer] = {"kernel": params[layer]["kernel"] * factor, "bias": bias}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), folded)


def _forward_in_float64(params, images):
    """Run a folded network with loops over taps; returns logits."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(images, np.float64)
    for layer in ("conv1", "conv2", "conv3"):
        kernel, height, width = params[layer]["kernel"], x.shape[1], x.shape[2]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = sum(
            padded[:, i : i + height, j : j + width] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        x = np.maximum(x + params[layer]["bias"], 0)
        x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
    x = x.reshape(len(x), -1) @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    return np.maximum(x, 0) @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def test_folded_batch_norm_gives_the_same_logits():
    variables, images = _small_network()
    folded = _folded(variables)
    expected = _forward_in_float64(folded, images)
    plain = _models.BatchNormCNN(normalize=None, **SMALL)
    given = jax.tree.map(jnp.shape, folded)
    assert jax.tree.map(jnp.shape, _shapes(plain, images.shape)) == given
    unfolded = jax.jit(_models.BatchNormCNN(**SMALL).apply)(variables, images)
    np.testing.assert_allclose(unfolded, expected, rtol=1e-4, atol=1e-4)
    without = jax.jit(plain.apply)({"params": folded}, images)
    np.testing.assert_allclose(without, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_in_training_agrees_with_flax():
    variables, images = _small_network()
    direct = _convolution.conv_windows_direct
    theirs = _models.BatchNormCNN(normalize=_normalized_by_flax, convolve=direct, **SMALL)

    def run(model):
        def loss(params):
            given = {**variables, "params": params}
            logits, moved = model.apply(given, images, True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits)), (logits, moved)

        return jax.grad(loss, has_aux=True)(variables["params"])

    actual, expected = jax.jit(lambda: (run(_models.BatchNormCNN(**SMALL)), run(theirs)))()
    chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_initialization_leaves_the_running_averages_alone():
    x = _draw((2, 4), 0) + 3
    made = _models.BatchNorm().init(jax.random.key(0), x, True)["batch_stats"]
    chex.assert_trees_all_equal(made, {"mean": jnp.zeros(4), "var": jnp.ones(4)})


def test_batch_norm_in_training_runs_without_mutable_averages():
    x = _draw((50, 4), 0) + 3
    norm: Any = _models.BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    normalized, moved = norm.apply(variables, x, True, mutable=["batch_stats"])
    chex.assert_trees_all_close(norm.apply(variables, x, True), normalized)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * x.mean(0), rtol=1e-5)


def test_batch_norm_of_a_constant_is_its_bias():
    norm: Any = _models.BatchNorm()
    x = jnp.full((8, 2), 1000.3)
    variables = {"params": {"scale": jnp.ones(2), "bias": jnp.asarray([0.5, -1.0])}}
    variables["batch_stats"] = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    normalized = norm.apply(variables, x, True)
    np.testing.assert_allclose(normalized, np.tile([[0.5, -1.0]], (8, 1)), atol=0.1)


def test_every_layer_lets_its_input_be_changed():
    variables, images = _small_network()
    model, seen = _models.BatchNormCNN(**SMALL), {}

    def change(layer, x):
        seen[layer] = x.shape
        return jnp.round(x * 4) / 4

    changed = jax.jit(partial(model.apply, change_inputs=change))(variables, images)
    assert seen == {
        "conv1": (1, 16, 16, 6),
        "conv2": (3, 8, 8, 6),
        "conv3": (4, 4, 4, 6),
        "dense1": (6, 20),
        "dense2": (6, 6),
    }
    rounded = jnp.round(images * 4) / 4
    assert not np.allclose(changed, jax.jit(model.apply)(variables, rounded), atol=1e-3)


def test_changing_one_input_is_changing_the_images_or_the_last_layer():
    variables, images = _small_network()
    apply: Any = jax.jit(_models.BatchNormCNN(**SMALL).apply, static_argnames="change_inputs")

    def doubled(name):
        return lambda layer, x: 2 * x if layer == name else x

    first = apply(variables, images, change_inputs=doubled("conv1"))
    np.testing.assert_allclose(first, apply(variables, 2 * images), rtol=1e-4, atol=1e-4)
    last = variables["params"]["dense2"]
    twice = {**variables["params"], "dense2": {**last, "kernel": 2 * last["kernel"]}}
    expected = apply({**variables, "params": twice}, images)
    actual = apply(variables, images, change_inputs=doubled("dense2"))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def _problem():
    """Return a small network's loss, first parameters, images and labels."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (40, 12, 12, 1), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, 40, dtype=np.int32))
    model = _models.LeNet5(filters=(3,), hidden=(8,))
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
