"""What follows a native product is computed with it, and is what it would be apart from it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st

import jopt
from jopt import quant, run
from tests import nets
from tests.conftest import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("native")]
OPERATIONS = {
    "plus": lambda y, numbers: y + numbers,
    "from the right": lambda y, numbers: numbers + y,
    "minus": lambda y, numbers: y - numbers,
    "less from": lambda y, numbers: numbers - y,
    "times": lambda y, numbers: y * numbers,
    "relu": lambda y, numbers: jax.nn.relu(y),
    "relu6": lambda y, numbers: jax.nn.relu6(y),
    "at most": lambda y, numbers: jnp.minimum(y, 0.5),
    "at least": lambda y, numbers: jnp.maximum(-0.5, y),
    "clip": lambda y, numbers: jnp.clip(y, -0.25, 2.0),
    "jit": lambda y, numbers: jax.jit(lambda y: jnp.minimum(jax.nn.relu(y), 3.0))(y),
    "all at most": lambda y, numbers: jnp.minimum(y, numbers),
    "residual": lambda y, numbers: y + jnp.sin(3 * jnp.arange(y.size)).reshape(y.shape),
    "residual first": lambda y, numbers: jnp.cos(jnp.arange(y.size)).reshape(y.shape) + y,
    "half": lambda y, numbers: y * 0.5,
    "tanh": lambda y, numbers: jnp.tanh(y),
}
KERNELS = {
    "int8": quant.QuantSpec(8, (1,)),
    "affine8": quant.QuantSpec(8, (1,), quant.minmax, quant.affine),
    "int4": quant.QuantSpec(4, (64, 1)),
    "codebook": quant.QuantSpec(4, (64, 1), quant.absmax, quant.nf4),
}


def calls(apply, *args, activations="float"):
    """Return the program of a model, and how many operations it has beside native kernels."""
    fast = run.compressed(apply, activations=activations)
    text = fast.lower(*args).as_text()
    beside = ("add", "subtract", "multiply", "maximum", "minimum")
    return fast, sum(text.count(f"stablehlo.{name} ") for name in beside)


@given(
    st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=5),
    st.sampled_from(sorted(KERNELS)),
    st.sampled_from([1, 5, 40]),
)
def test_any_operations_after_a_product(names, kind, rows):
    inputs = jax.random.normal(jax.random.key(rows), (rows, 64))
    kernel = quant.quantize(jax.random.normal(jax.random.key(1), (64, 19)) / 8, KERNELS[kind])
    numbers = jax.random.normal(jax.random.key(2), (len(names), 1, 19))

    def apply(params, x):
        y = x @ params["kernel"]
        for name, each in zip(names, params["numbers"], strict=True):
            y = OPERATIONS[name](y, each)
        return y

    params = {"kernel": kernel, "numbers": numbers}
    prepared = run.prepare(apply, params, inputs)
    outputs = run.compressed(apply)(prepared, inputs)
    expected = apply(jopt.materialize(params), inputs)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5 * (1 + abs(expected).max()))


def dense(params, x):
    return jax.nn.relu(x @ params["kernel"] + params["bias"])


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("kind", ["int8", "affine8", "int4"])
def test_a_bias_and_a_relu_are_no_operations_of_their_own(kind, activations):
    x = jax.random.normal(jax.random.key(0), (3, 64))
    kernel = quant.quantize(jax.random.normal(jax.random.key(1), (64, 20)), KERNELS[kind])
    params = {"kernel": kernel, "bias": jnp.linspace(-2.0, 2.0, 20)[None]}
    prepared = run.prepare(dense, params, x)
    alone = calls(lambda params, x: x @ params["kernel"], prepared, x, activations=activations)[1]
    fast, beside = calls(dense, prepared, x, activations=activations)
    assert beside == alone
    expected = dense(jopt.materialize(params), x)
    bound = 1e-5 if activations == "float" else 0.02
    assert abs(fast(prepared, x) - expected).max() <= bound * expected.max()
    nan = fast(prepared, x.at[1, 2].set(jnp.nan))
    assert jnp.isnan(nan[1]).all()
    assert not jnp.isnan(nan[0]).any()


def test_residuals_and_two_products_that_are_added():
    x = jax.random.normal(jax.random.key(0), (3, 64))
    kernels = jax.random.normal(jax.random.key(1), (2, 64, 64)) / 8
    one, other = (quant.quantize(kernel, KERNELS["int8"]) for kernel in kernels)
    params = {"one": one, "other": other, "bias": jnp.linspace(-1.0, 1.0, 64)[None]}

    def apply(params, x):
        x = jax.nn.relu(x + (x @ params["one"] + params["bias"]))
        return jax.nn.relu(x @ params["one"] + x @ params["other"])

    prepared = run.prepare(apply, params, x)
    fast = run.compressed(apply)
    text = fast.lower(prepared, x).as_text()
    assert not any(f"stablehlo.{name} " in text for name in ("add", "maximum"))
    expected = apply(jopt.materialize(params), x)
    chex.assert_trees_all_close(fast(prepared, x), expected, rtol=1e-5, atol=1e-5)
    several = jnp.stack([x, -x])
    outputs = jax.vmap(fast, (None, 0))(prepared, several)
    expected = jnp.stack([apply(jopt.materialize(params), each) for each in several])
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-5)


class Normed(linen.Module):
    """A convolution, one of every channel by itself and one of single elements, with batch norm."""

    @linen.compact
    def __call__(self, x):
        norm = functools.partial(linen.BatchNorm, use_running_average=True)
        x = linen.relu6(norm()(linen.Conv(20, (3, 3), strides=2)(x)))
        x = linen.relu6(norm()(linen.Conv(20, (3, 3), feature_group_count=20, use_bias=False)(x)))
        return norm()(linen.Conv(9, (1, 1), use_bias=False)(x))


@pytest.mark.parametrize("quantized", [False, True])
def test_batch_norms_and_relu6_go_into_convolutions(quantized):
    model, x = Normed(), jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    params = jax.tree.map(
        lambda array: jax.random.uniform(jax.random.key(array.size), array.shape, minval=0.2),
        model.init(jax.random.key(1), x),
    )
    if quantized:
        params["params"] = quant.quantize_params(params["params"], KERNELS["int8"], ".*kernel")
    prepared = run.prepare(model.apply, params, x)
    fast, _ = calls(model.apply, prepared, x)
    text = fast.lower(prepared, x).as_text()
    assert "stablehlo.maximum " not in text
    assert "stablehlo.minimum " not in text
    plain = jopt.materialize(params)
    chex.assert_trees_all_close(fast(prepared, x), model.apply(plain, x), rtol=1e-5, atol=1e-5)

    def loss(apply):
        return lambda params, x: jnp.sum(apply(params, x) ** 2)

    gradient = jax.grad(loss(fast), argnums=1)(prepared, x)
    expected = jax.grad(loss(model.apply), argnums=1)(plain, x)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    if not quantized:
        gradients = jax.grad(loss(fast))(prepared, x)
        chex.assert_trees_all_close(gradients, jax.grad(loss(model.apply))(plain, x), rtol=1e-3)
    several = jnp.stack([x, 2 * x])
    outputs = jax.vmap(fast, (None, 0))(prepared, several)
    for output, each in zip(outputs, several, strict=True):
        chex.assert_trees_all_close(output, model.apply(plain, each), rtol=1e-5, atol=1e-5)


def test_what_several_operations_read_is_computed_once():
    x = jax.random.normal(jax.random.key(0), (5, 64))
    kernel = quant.quantize(jax.random.normal(jax.random.key(1), (64, 20)), KERNELS["int8"])
    params = {"kernel": kernel, "bias": jnp.linspace(-2.0, 2.0, 20)[None]}

    def apply(params, x):
        y = x @ params["kernel"]
        gate = y + params["bias"]
        return y, jax.nn.relu(gate), gate * jax.nn.sigmoid(gate), y + y

    prepared = run.prepare(apply, params, x)
    fast = run.compressed(apply)
    expected = apply(jopt.materialize(params), x)
    chex.assert_trees_all_close(fast(prepared, x), expected, rtol=1e-5, atol=1e-5)
    assert fast.lower(prepared, x).as_text().count("custom_call @jopt_") == 1


@pytest.mark.parametrize("model", [nets.InvertedResidual(), nets.Residual()])
def test_residual_networks_run_as_they_are(model):
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = jax.tree.map(
        lambda array: (
            jax.random.uniform(jax.random.key(array.size), array.shape, minval=-0.4) + 0.1
        ),
        model.init(jax.random.key(1), images),
    )
    params["params"] = quant.quantize_params(params["params"], KERNELS["int8"], ".*kernel")
    params["batch_stats"] = jax.tree.map(jnp.abs, params["batch_stats"])
    outputs = run.compressed(model.apply)(run.prepare(model.apply, params, images), images)
    expected = model.apply(jopt.materialize(params), images)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_layers_of_nnx_within_a_scan():
    layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    params = jax.tree.map(lambda array: jnp.stack([array, 0.5 * array + 0.01]), state)
    params = quant.quantize_params(params, quant.QuantSpec(8, (1, -1, 1)), ".*kernel.*")
    x = jax.random.normal(jax.random.key(1), (4, 64))

    def apply(params, x):
        def step(x, layer):
            return jax.nn.relu(nnx.merge(graph, layer)(x)), None

        return jax.lax.scan(step, x, params)[0]

    prepared = run.prepare(apply, params, x)
    outputs = run.compressed(apply)(prepared, x)
    chex.assert_trees_all_close(outputs, apply(jopt.materialize(params), x), rtol=1e-5, atol=1e-5)
