"""Whole networks go through every method: transformers and depthwise convolutions, linen and nnx.

Tables of embeddings, tied or not, layer and batch norms stay as they are, and it is said why.
"""

from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jopt
from experiments import _bert, _decoder
from jopt import codec, distill, layers, prune, quant, run
from jopt._trees import flatten_with_paths
from tests.test_battery import TRANSFORMS

IDS = jax.random.randint(jax.random.key(1), (3, 6), 0, 11)
NAMED = {"grid_kmeans", "grid_mxfp4", "grid_nvfp4"}  # chosen by the names of that battery's layers
NAMED |= {name for name in TRANSFORMS if name.startswith("grid_mxfp")}


class NnxText(nnx.Module):
    """A transformer whose table of tokens serves both ends."""

    def __init__(self, rngs):
        self.tokens = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, ids):
        x = self.tokens(ids)
        x = x + self.attention(self.norm(x))
        return self.tokens.attend(x + self.down(nnx.gelu(self.up(x))))


class NnxImage(nnx.Module):
    """An inverted residual: pointwise, depthwise, pointwise, each with a batch norm."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.expand = nnx.Conv(8, 16, (1, 1), use_bias=False, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.project = nnx.Conv(16, 8, (1, 1), rngs=rngs)
        self.norms = nnx.List(
            [nnx.BatchNorm(n, use_running_average=True, rngs=rngs) for n in (16, 16)]
        )
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, images):
        x = self.stem(images)
        y = nnx.relu6(self.norms[0](self.expand(x)))
        y = nnx.relu6(self.norms[1](self.depthwise(y)))
        return self.head((x + self.project(y)).mean((1, 2)))


def _of_linen(module, x):
    params = module.init(jax.random.key(0), x)["params"]
    return (lambda params, x: module.apply({"params": params}, x)), params, x


def _of_nnx(module, x):
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return (lambda params, x: nnx.merge(graph, params, rest)(x)), params, x


class Image(linen.Module):
    """An inverted residual of linen, as EfficientNet-Lite0 has them, norms folded."""

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(8, (3, 3), name="stem")(images)
        y = linen.relu6(linen.Conv(16, (1, 1), name="expand")(x))
        y = linen.relu6(linen.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(y))
        return linen.Dense(5, name="head")(
            (x + linen.Conv(8, (1, 1), name="project")(y)).mean((1, 2))
        )


class _Logits(_decoder.Decoder):
    """The decoder without its cache."""

    def __call__(self, ids):
        return super().__call__(ids)[0]


@cache
def _network(name):
    """Return a forward pass, parameters that are nowhere zero, and inputs."""
    images = jax.random.normal(jax.random.key(2), (3, 6, 6, 3))
    sizes: Any = {"layers": 2, "width": 8, "heads": 2, "hidden": 12, "positions": 12}
    make = {
        "bert": lambda: _of_linen(_bert.BertEncoder(vocabulary=11, **sizes), IDS),
        "decoder": lambda: _of_linen(_Logits(11, **sizes), IDS),
        "nnx text": lambda: _of_nnx(NnxText(nnx.Rngs(0)), IDS),
        "image": lambda: _of_linen(Image(), images),
        "nnx image": lambda: _of_nnx(NnxImage(nnx.Rngs(0)), images),
    }[name]
    apply, params, x = make()
    waves = lambda leaf: 0.3 * jnp.sin(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape)  # noqa: E731
    return apply, jax.tree.map(lambda leaf: leaf + waves(leaf), params), x


SOME = {"two_of_four", "erdos_renyi"}  # kernels that do not divide by four, or keep all
NETWORKS = ("bert", "decoder", "nnx text", "image", "nnx image")
METHODS = [name for name in TRANSFORMS if name not in NAMED]
PAIRS = [(method, NETWORKS[place % len(NETWORKS)]) for place, method in enumerate(METHODS)]


@pytest.mark.parametrize(("method", "name"), PAIRS)  # each meets one network here, to save time
def test_every_method_takes_whole_networks(method, name):
    apply, params, x = _network(name)
    changed = TRANSFORMS[method](params)
    restored = jopt.materialize(changed)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, params)
    chex.assert_trees_all_equal_structs(restored, params)
    paths, before, _ = flatten_with_paths(params)
    after = flatten_with_paths(restored)[1]
    for path, old, new in zip(paths, before, after, strict=True):
        same = np.array_equal(old, new)
        kernel = jopt.is_kernel(path, old)
        assert same or kernel or method == "biases_too", path
        assert not same or not kernel or method in SOME, path
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))
    assert np.isfinite(apply(restored, x)).all()


KERNELS = {"bert": 12, "decoder": 13, "nnx text": 7, "image": 5, "nnx image": 5}
CALIBRATED = (quant.gptq, quant.awq, quant.smooth_quant, quant.hadamard_rotation, quant.hqq)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_kernel_is_left_out_in_silence(name, tmp_path):
    apply, params, x = _network(name)
    report = layers.find_layers(apply, params, x)
    assert len(report.layers) == KERNELS[name]
    paths, leaves, _ = flatten_with_paths(params)
    kernels = {path for path, leaf in zip(paths, leaves, strict=True) if jopt.is_kernel(path, leaf)}
    assert kernels == set(report.layers) | set(report.others)
    assert all(report.others.values())  # and why
    statistics = layers.calibrate(apply, params, [x])
    for method in CALIBRATED:
        spec = quant.QuantSpec(4)
        changed, found = quant.quantize_calibrated_params(params, statistics, spec, method)
        assert set(found) == kernels
        if method is quant.hadamard_rotation and "image" in name:
            assert "cannot be rotated across their groups" in found["depthwise/kernel"]
        codes = dict(zip(*flatten_with_paths(changed)[:2], strict=True))
        assert {path for path in kernels if jopt.is_compressed(codes[path])} == kernels
        ready = run.prepare(apply, changed, x)
        rows = run.explain(apply, ready, x).rows
        assert {row.path for row in rows} >= kernels
        assert all(row.why for row in rows if row.form in {"restored", "XLA, dot"})
        outputs = run.compressed(apply)(ready, x)
        chex.assert_trees_all_close(outputs, apply(jopt.materialize(changed), x), atol=1e-4)
    in_order = quant.quantize_in_order(apply, params, [x], spec, quant.hadamard_rotation)[1]
    assert set(in_order) == kernels
    codec.save(tmp_path / "net.jopt", changed)
    loaded = codec.load(tmp_path / "net.jopt", like=changed)
    chex.assert_trees_all_equal(jopt.materialize(loaded), jopt.materialize(changed))


@pytest.mark.parametrize("name", NETWORKS)
def test_units_go_and_a_student_learns(name):
    apply, params, x = _network(name)
    groups = prune.find_groups(apply, params, x)
    scores = prune.unit_scores(groups, prune.magnitude_scores(params))
    keep = prune.topk_masks(scores, 0.5, ".*")
    small = prune.shrink(apply, params, prune.unit_masks(groups, params, keep), x)
    before, after = (sum(map(np.size, jax.tree.leaves(tree))) for tree in (params, small.params))
    assert after < 0.8 * before
    teacher = apply(params, x)

    def loss(params):
        return distill.kd_loss(small.apply(params, x), teacher, temperature=2.0).mean()

    gradient = jax.jit(jax.grad(loss))(small.params)
    stepped = jax.tree.map(lambda leaf, slope: leaf - 0.001 * slope, small.params, gradient)
    assert loss(stepped) < loss(small.params)
