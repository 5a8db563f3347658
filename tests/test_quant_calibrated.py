"""Methods after training on layers as training leaves them, over trees and layer by layer."""

from functools import partial

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import quant
from jopt._leaves import RotatedTensor, ScaledTensor
from jopt.layers._calibrate import calibrate
from jopt.layers._outcome import Outcome, keep_better
from jopt.layers._statistics import InputStatistics
from jopt.quant import QuantSpec
from jopt.quant._awq import awq
from jopt.quant._calibrated import format_report, quantize_calibrated_params
from jopt.quant._codebook import nf4
from jopt.quant._drift import Drift, corrected_weights, drifted_error
from jopt.quant._gptq import gptq
from jopt.quant._propagate import quantize_in_order
from jopt.quant._smooth import smooth_quant
from tests import trained

SPEC = QuantSpec(3, (16, 1), quant.minmax, quant.affine)
SPEC4 = QuantSpec(4)


def outcome_of(report, path) -> Outcome:
    entry = report[path]
    assert isinstance(entry, Outcome)
    return entry


def images(count=512):
    return trained.images(jax.random.key(9), count)


def apply(params, inputs):
    return trained.forward(params, inputs)[1]


def test_gptq_moves_weights_further_and_outputs_less():
    params, statistics = trained.network()
    small, report = quantize_calibrated_params(params, statistics, SPEC, gptq)
    nearest = quant.quantize_params(params, SPEC)
    assert list(report) == [f"dense{n}/kernel" for n in range(3)]
    for name, layer in params.items():
        moved = [
            float(jnp.square(jopt.materialize(tree[name]["kernel"]) - layer["kernel"]).sum())
            for tree in (small, nearest)
        ]
        assert moved[0] > moved[1]
        outcome = outcome_of(report, f"{name}/kernel")
        assert bool(outcome.improved) and outcome.error < 0.8 * outcome.baseline
    held_out = images()
    target = apply(params, held_out)
    errors = [
        float(jnp.square(apply(jopt.materialize(tree), held_out) - target).mean())
        for tree in (small, nearest)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", [awq, smooth_quant])
def test_scaling_is_never_worse_and_sometimes_better(method):
    params, statistics = trained.network()
    _, report = quantize_calibrated_params(params, statistics, SPEC, method)
    outcomes = [outcome_of(report, path) for path in report]
    assert all(outcome.error <= outcome.baseline for outcome in outcomes)
    assert any(bool(outcome.improved) for outcome in outcomes)


def test_in_order_errors_do_not_pile_up():
    params, statistics = trained.network()
    data = [trained.images(jax.random.key(seed), 512) for seed in range(2)]
    small, report = quantize_in_order(apply, params, data, SPEC, gptq)
    assert list(report) == [f"dense{n}/kernel" for n in range(3)]
    outcomes = [outcome_of(report, path) for path in report]
    assert all(outcome.error <= outcome.baseline for outcome in outcomes)
    apart, _ = quantize_calibrated_params(params, calibrate(apply, params, data), SPEC, gptq)
    target = [apply(params, batch) for batch in data]
    errors = [
        sum(
            float(jnp.square(apply(jopt.materialize(tree), x) - y).sum(-1).mean())
            for x, y in zip(data, target, strict=True)
        )
        / 2
        for tree in (small, apart)
    ]
    assert errors[0] < errors[1]
    # What the report says of the last layer is what the network's outputs show.
    np.testing.assert_allclose(outcome_of(report, "dense2/kernel").error, errors[0], rtol=1e-2)


def drifted(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.normal(size=(200, 6))
    seen = wanted @ (np.eye(6) + 0.2 * rng.normal(size=(6, 6))) + 0.1 * rng.normal(size=(200, 6))
    gram, difference = seen.T @ seen / 200, wanted - seen
    flat = jnp.zeros(6)
    statistics = InputStatistics(flat[0], flat, flat, flat, jnp.asarray(gram, jnp.float32))
    drift = Drift(
        jnp.asarray(seen.T @ difference / 200, jnp.float32),
        jnp.asarray(difference.T @ difference / 200, jnp.float32),
    )
    return wanted, seen, statistics, drift


def test_the_corrected_kernel_is_the_least_squares_solution():
    wanted, seen, statistics, drift = drifted(0)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        found = corrected_weights(weights, statistics, drift, 0.0)
    target = wanted @ np.asarray(weights, np.float64)
    expected = np.linalg.lstsq(seen, target, rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    held = corrected_weights(weights, statistics, drift, 1e6)
    np.testing.assert_allclose(held, weights, atol=1e-4)
    error = drifted_error(weights, found, statistics, drift)
    np.testing.assert_allclose(error, np.square(seen @ expected - target).sum(-1).mean(), rtol=1e-3)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(8, name="dense")(x)), None


class Tower(linen.Module):
    """Scanned blocks between a grouped convolution, heads, and a tied embedding."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (3,), feature_group_count=2, name="conv")(x)
        blocks = linen.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="blocks")(x, None)
        x = linen.MultiHeadDotProductAttention(2, name="attention")(x)
        table = self.param("table", linen.initializers.normal(), (8, 8))
        return x @ table.T


@pytest.fixture(scope="module")
def tower():
    model, x = Tower(), jax.random.normal(jax.random.key(0), (16, 6, 8))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    return (lambda params, x: model.apply({"params": params}, x)), params, x


def test_stacked_grouped_and_many_axed_kernels_are_quantized(tower):
    run, params, x = tower
    figures = calibrate(run, params, [x])
    del figures["attention/key/kernel"]
    chosen = r"(conv|blocks|attention/out|attention/key).*/kernel"
    small, report = quantize_calibrated_params(params, figures, QuantSpec(3), gptq, chosen)
    blocks = outcome_of(report, "blocks/dense/kernel")
    assert blocks.improved.shape == (3,) and bool(blocks.improved.all())
    assert bool(outcome_of(report, "conv/kernel").improved)
    assert bool(outcome_of(report, "attention/out/kernel").improved)
    assert report["attention/key/kernel"] == "rounded to nearest: no statistics"
    alone, _ = gptq(
        params["blocks"]["dense"]["kernel"][1],
        jax.tree.map(lambda field: field[1], figures["blocks/dense/kernel"]),
        QuantSpec(3),
    )
    one = jax.tree.map(lambda field: field[1], small["blocks"]["dense"]["kernel"])
    chex.assert_trees_all_close(jopt.materialize(one), jopt.materialize(alone), atol=1e-6)
    table = format_report(report)
    assert "3 of 3 layers improved" in table and "no statistics" in table
    assert len(table.splitlines()) == 1 + len(report)


def test_in_order_says_what_it_could_not_follow(tower):
    run, params, x = tower
    chosen = r"table|conv/kernel|blocks/.*kernel"
    small, report = quantize_in_order(run, params, [x], QuantSpec(3), gptq, chosen)
    assert list(report) == ["conv/kernel", "blocks/dense/kernel", "table"]
    assert "its axes (1,) are its inputs" in report["table"]
    assert outcome_of(report, "blocks/dense/kernel").improved.shape == (3,)
    chex.assert_trees_all_equal(small["table"], quant.quantize(params["table"], QuantSpec(3)))
    assert jopt.materialize(small)["conv"]["kernel"].shape == params["conv"]["kernel"].shape


def test_statistics_of_another_layer_are_reported():
    params, statistics = trained.network()
    _, report = quantize_calibrated_params(
        params,
        {"dense1/kernel": statistics["dense2/kernel"]},
        QuantSpec(4),
        gptq,
        "dense1/kernel",
    )
    assert "32 features fit no leading axes of weights of shape (48, 32)" in report["dense1/kernel"]


def test_round_to_nearest_takes_the_form_of_the_method():
    weights = jax.random.normal(jax.random.key(2), (8, 3))
    flat = jnp.ones(8)
    statistics = InputStatistics(flat[0], flat, flat, flat, jnp.eye(8))
    nearest, bad = quant.quantize(weights, SPEC4), quant.quantize(-weights, SPEC4)
    forms = [
        bad,
        ScaledTensor(bad, flat[:, None]),
        RotatedTensor(bad, jnp.ones((8, 1), jnp.int8)),
    ]
    for form in forms:
        leaf, outcome = jax.jit(keep_better)(weights, form, nearest, statistics)
        assert type(leaf) is type(form) and not bool(outcome.improved)
        chex.assert_trees_all_equal(jopt.materialize(leaf), jopt.materialize(nearest))
    with pytest.raises(TypeError, match="a QTensor cannot take the place of a CodebookTensor"):
        other = quant.quantize(weights, QuantSpec(4, grid=nf4))
        keep_better(weights, other, nearest, statistics)


def test_errors_name_the_leaf():
    params, statistics = trained.network()
    call = partial(quantize_calibrated_params, params, statistics, method=gptq)
    with pytest.raises(ValueError, match=r"dense0/kernel: block \(7, 1\) does not divide"):
        call(spec=QuantSpec(4, (7, 1)))
    with pytest.raises(ValueError, match="matches no leaf"):
        call(spec=QuantSpec(4), where="nothing")
    small = {"w": quant.quantize(jnp.ones((2, 2)), QuantSpec())}
    with pytest.raises(TypeError, match="w: the leaf is compressed already"):
        quantize_calibrated_params(small, {}, QuantSpec(), gptq, ".*")
    with pytest.raises(TypeError, match="w: the leaf is compressed already"):
        quantize_in_order(lambda p, x: x, small, [jnp.ones(2)], QuantSpec(), gptq, ".*")
    spoiled = {"w": jnp.full((2, 2), jnp.nan)}
    with pytest.raises(ValueError, match="w: values must be finite"):
        quantize_calibrated_params(spoiled, {}, QuantSpec(), gptq)
    with pytest.raises(ValueError, match="at least one batch"):
        quantize_in_order(apply, params, [], QuantSpec(), gptq)
