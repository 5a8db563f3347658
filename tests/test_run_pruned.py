"""Kernels of which whole inputs or outputs are zeros run as what is left of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import jopt
from jopt import prune, quant, run
from tests.test_run import apply, reference


def _gaps(size, rate, seed):
    """Return where a unit is zero, at random."""
    return np.random.default_rng(seed).random(size) < rate


def _kernel(shape, inputs, outputs, seed=0):
    """Draw a kernel and empty some of its inputs, axis -2, and of its outputs, axis -1."""
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    kernel[..., _gaps(shape[-2], inputs, 1), :] = 0
    kernel[..., _gaps(shape[-1], outputs, 2)] = 0
    return jnp.asarray(kernel)


RATES = {"inputs": (0.6, 0.0), "outputs": (0.0, 0.6), "both": (0.4, 0.4)}
SPECS = {
    "float": None,
    "int8": quant.QuantSpec(8),
    "int8 by group": quant.QuantSpec(8, (16, 1)),
    "int4": quant.QuantSpec(4),
    "affine4": quant.QuantSpec(4, (1,), quant.minmax, quant.affine_zero),
    "int4 by 32": quant.QuantSpec(4, (32, 1)),
    "codebook": quant.QuantSpec(2, (), quant.absmax, quant.codebook((-1.0, 0.0, 0.5))),
}


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("units", sorted(RATES))
@pytest.mark.parametrize("name", sorted(SPECS))
def test_what_is_left_gives_the_outputs_of_the_whole(name, units, activations):
    params = {"first": _kernel((96, 192), *RATES[units]), "second": jnp.ones((192, 5))}
    if SPECS[name] is not None:
        params = quant.quantize_params(params, SPECS[name], "first")
    x = jax.random.normal(jax.random.key(4), (3, 96))
    ready = run.prepare(apply, params, x)
    by_group = SPECS[name] is not None and SPECS[name].block in {(16, 1), (32, 1)}
    narrow = isinstance(ready["first"], run.NarrowMatrix)
    assert narrow == (not by_group or units == "outputs")
    if narrow:
        inner = ready["first"].matrix
        assert inner.inputs * inner.outputs <= 0.5 * params["first"].size
    chex.assert_trees_all_close(jopt.materialize(ready), jopt.materialize(params), rtol=1e-6)
    outputs = run.compressed(apply, activations=activations)(ready, x)
    expected = reference(params, x)
    loose = activations == "int8" and name != "float"
    np.testing.assert_allclose(outputs, expected, atol=1.5 if loose else 1e-4, rtol=1e-5)
    assert not loose or np.abs(outputs - expected).mean() < 0.2


def test_gradients_are_those_of_the_whole_where_something_is_left():
    params = {"first": _kernel((96, 192), 0.4, 0.4), "second": jnp.ones((192, 5))}
    x = jax.random.normal(jax.random.key(4), (3, 96))
    ready, fast = run.prepare(apply, params, x), run.compressed(apply)

    def loss(apply):
        return lambda params, x: jnp.sum(apply(params, x) ** 2)

    found = jax.grad(loss(fast), (0, 1), allow_int=True)(ready, x)
    expected = jax.grad(loss(apply), (0, 1))(params, x)
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    kernel = ready["first"]
    outputs = np.flatnonzero(np.asarray(kernel.places) < kernel.matrix.outputs)
    left = expected[0]["first"][kernel.kept][:, outputs]
    chex.assert_trees_all_close(found[0]["first"].matrix.kernel, left, rtol=1e-4, atol=1e-4)
    alone = [fast(ready, each[None])[0] for each in x]
    chex.assert_trees_all_close(jax.vmap(fast, (None, 0))(ready, x), jnp.stack(alone), rtol=1e-5)


class Net(linen.Module):
    """Convolutions, an attention and a dense layer."""

    @linen.compact
    def __call__(self, images):
        hidden = linen.relu(linen.Conv(16, (3, 3), strides=2, name="window")(images))
        hidden = linen.relu(linen.Conv(24, (1, 1), name="pointwise")(hidden))
        hidden = hidden.reshape(len(images), -1, 24)
        hidden = linen.MultiHeadDotProductAttention(4, name="attention")(hidden)
        return linen.Dense(10, name="head")(hidden.mean(1))


def test_units_that_masks_empty_are_left_out_of_all_kinds_of_layers():
    net = Net()
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = net.init(jax.random.key(1), images)["params"]
    apply = lambda params, x: net.apply({"params": params}, x)  # noqa: E731
    groups = prune.find_groups(apply, params, images)
    scores = prune.unit_scores(groups, prune.magnitude_scores(params))
    keep = prune.topk_masks(scores, 0.5, ".*")
    params = prune.apply_masks(params, prune.unit_masks(groups, params, keep))
    ready = run.prepare(apply, params, images)
    narrow = {row.path for row in run.explain(apply, ready, images).rows if "Narrow" in row.leaf}
    assert {"window/kernel", "pointwise/kernel", "head/kernel"} <= narrow
    assert any(path.startswith("attention/") for path in narrow)
    chex.assert_trees_all_close(jopt.materialize(ready), params)
    outputs = run.compressed(apply)(ready, images)
    chex.assert_trees_all_close(outputs, apply(params, images), rtol=1e-5, atol=1e-5)
    assert outputs.dtype == jnp.float32
    half = run.compressed(apply)(ready, images.astype(jnp.bfloat16))
    chex.assert_trees_all_close(half, outputs, atol=0.05)


def test_channels_of_windows_are_those_of_every_element():
    kernel = _kernel((3, 2, 8, 12), 0.3, 0.3)
    assert 0 < np.count_nonzero(kernel[0, 0]) <= 48
    apply = lambda params, x: lax.conv_general_dilated(  # noqa: E731
        x, params["w"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 8))
    ready = run.prepare(apply, {"w": kernel}, x)
    assert isinstance(ready["w"], run.NarrowMatrix)
    chex.assert_trees_all_equal(jopt.materialize(ready)["w"], kernel)
    outputs = run.compressed(apply)(ready, x)
    chex.assert_trees_all_close(outputs, apply({"w": kernel}, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_few_zeros_are_kept_and_nothing_but_zeros_leaves_one_unit(rate):
    params = {"first": _kernel((96, 192), rate, 0.0), "second": jnp.ones((192, 5))}
    x = jnp.ones((2, 96))
    ready = run.prepare(apply, params, x)["first"]
    if rate < 0.5:
        assert ready is params["first"]
    else:
        assert ready.matrix.kernel.shape == (1, 1)
        outputs = run.compressed(apply)({**params, "first": ready}, x)
        chex.assert_trees_all_equal(outputs, jnp.zeros((2, 5)))
    traced = jax.jit(lambda params: run.prepare(apply, params, x))(params)
    assert isinstance(traced["first"], jax.Array)  # of a tracer no value is known
