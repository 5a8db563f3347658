"""Compressed leaves inside scans, maps and stacked modules: what qwix-like tools stumble over."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jopt
from jopt import codec, layers, quant
from jopt.quant import QuantSpec

KINDS = {
    "q": QuantSpec(4, (8, 1)),
    "affine": QuantSpec(3, (1,), quant.minmax, quant.affine),
    "codebook": QuantSpec(4, (1,), grid=quant.kmeans),
    "nf4": QuantSpec(4, (8, 1), grid=quant.nf4),
    "float": QuantSpec(8, (1,), grid=quant.e4m3),
    "mx": QuantSpec(4, (8, 1), grid=quant.mxfp4),
}


def compressors():
    yield from (
        (name, lambda kernel, spec=spec: quant.quantize(kernel, spec))
        for name, spec in KINDS.items()
    )
    yield "bits", quant.binarize
    yield "rotated", lambda kernel: quant.hadamard_rotation(kernel, None, QuantSpec(4))[0]
    yield (
        "scaled",
        lambda kernel: jopt.ScaledTensor(
            quant.quantize(kernel, QuantSpec(4)), jnp.ones((kernel.shape[0], 1))
        ),
    )


COMPRESSORS = dict(compressors())


@pytest.mark.parametrize("name", COMPRESSORS)
def test_stacked_leaves_scan_map_and_come_back_from_a_file(name, tmp_path):
    """Layers stacked by vmap materialize as a whole, one by one in a scan, and after a file."""
    kernels = jax.random.normal(jax.random.key(0), (3, 16, 16))
    stacked = jax.jit(jax.vmap(COMPRESSORS[name]))(kernels)
    alone = jnp.stack([jopt.materialize(COMPRESSORS[name](kernel)) for kernel in kernels])
    np.testing.assert_allclose(jopt.materialize(stacked), alone, rtol=1e-5, atol=1e-6)
    inputs = jnp.ones((2, 16))

    @jax.jit
    def scanned(leaf):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ jopt.materialize(k)), None), inputs, leaf)[0]

    wanted = inputs
    for kernel in alone:
        wanted = jnp.tanh(wanted @ kernel)
    np.testing.assert_allclose(scanned(stacked), wanted, rtol=1e-4, atol=1e-5)
    codec.save(tmp_path / "net.jopt", {"kernel": stacked})
    loaded = codec.load(tmp_path / "net.jopt")["kernel"]
    assert type(loaded) is type(stacked)
    np.testing.assert_array_equal(jopt.materialize(loaded), jopt.materialize(stacked))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(16, name="dense")(x)), None


def scanned_linen():
    stack = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    model = stack(name="layers")
    x = jax.random.normal(jax.random.key(1), (64, 16))
    params = model.init(jax.random.key(0), x, None)["params"]
    return (lambda params, x: model.apply({"params": params}, x, None)[0]), params, x


def vmapped_nnx():
    @nnx.vmap
    def make(key):
        return nnx.Linear(16, 16, rngs=nnx.Rngs(key))

    graph, params = nnx.split(make(jax.random.split(jax.random.key(0), 3)))

    def apply(params, x):
        @nnx.vmap(in_axes=(0, 0))
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(nnx.merge(graph, params), x)

    return apply, params, jax.random.normal(jax.random.key(1), (3, 64, 16))


@pytest.mark.parametrize("build", [scanned_linen, vmapped_nnx])
@pytest.mark.parametrize("method", ["gptq", "awq", "smooth_quant", "adaround", "quantize_weighted"])
def test_methods_after_training_reach_scanned_and_vmapped_modules(build, method):
    apply, params, x = build()
    statistics = layers.calibrate(apply, params, [x])
    (path,) = statistics
    assert statistics[path].gram.shape == (3, 16, 16)
    small, report = quant.quantize_calibrated_params(
        params, statistics, QuantSpec(3), getattr(quant, method)
    )
    outcome = report[path]
    assert not isinstance(outcome, str) and outcome.improved.shape == (3,)
    outputs = [apply(tree, x) for tree in (params, jopt.materialize(small))]
    nearest = apply(jopt.materialize(quant.quantize_params(params, QuantSpec(3))), x)
    error = [float(jnp.mean((y - outputs[0]) ** 2)) for y in (outputs[1], nearest)]
    assert error[0] < 1.05 * error[1]


def test_copies_with_one_input_count_as_stacked_layers():
    """Each has the statistics of the input that they share, and so a kernel of its own."""
    kernels = jax.random.normal(jax.random.key(0), (3, 16, 8))
    x = jax.random.normal(jax.random.key(1), (64, 4)) @ jax.random.normal(
        jax.random.key(2), (4, 16)
    )

    def apply(params, x):
        return jax.vmap(lambda kernel: x @ kernel)(params["kernel"])

    statistics = layers.calibrate(apply, {"kernel": kernels}, [x])["kernel"]
    assert statistics.gram.shape == (3, 16, 16)
    for method in (quant.gptq, quant.awq):
        small, report = quant.quantize_calibrated_params(
            {"kernel": kernels}, {"kernel": statistics}, QuantSpec(3), method
        )
        alone = layers.calibrate(lambda kernel, x: x @ kernel, kernels[1], [x])[""]
        leaf, outcome = method(kernels[1], alone, QuantSpec(3))
        np.testing.assert_allclose(
            jopt.materialize(small["kernel"])[1], jopt.materialize(leaf), rtol=1e-3, atol=1e-3
        )
        stacked = report["kernel"]
        assert not isinstance(stacked, str) and stacked.improved.shape == (3,)
        np.testing.assert_allclose(stacked.error[1], outcome.error, rtol=1e-3)


def test_a_square_embedding_used_transposed_is_not_taken_for_a_dense_kernel():
    table = jax.random.normal(jax.random.key(0), (16, 16))
    params, ids = {"table": table}, jnp.arange(16)

    def apply(params, ids):
        return params["table"][ids] @ params["table"].T

    statistics = layers.calibrate(apply, params, [ids])
    assert statistics == {}
    _, report = quant.quantize_calibrated_params(params, statistics, QuantSpec(3), quant.gptq)
    assert report == {"table": "rounded to nearest: no statistics"}
    assert set(layers.accumulate(apply, params, [ids])) == {"table"}


def test_weight_only_convolutions_are_quantized_by_every_method():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(8, (3, 3), name="conv")(x))
            return linen.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)

    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 2))
    params = Net().init(jax.random.key(0), x)["params"]

    def apply(params, x) -> Any:
        return Net().apply({"params": params}, x)

    statistics = layers.calibrate(apply, params, [x])
    for method in (quant.gptq, quant.awq, quant.quantize_weighted):
        small, report = quant.quantize_calibrated_params(params, statistics, QuantSpec(3), method)
        assert set(report) == {"conv/kernel", "depthwise/kernel"}
        for outcome in report.values():
            assert not isinstance(outcome, str) and outcome.error <= outcome.baseline
        assert apply(jopt.materialize(small), x).shape == (4, 8, 8, 8)
