"""Batch norm folded into kernels, and its averages taken anew."""

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jopt
from jopt import quant
from jopt.layers._reestimate import average_statistics, reestimate_batch_norm
from jopt.quant import QuantSpec
from jopt.quant._batch_norm import fold_batch_norm, fold_batch_norms, remove_batch_norms
from tests import oracles_training as oracles


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def norm_state(seed, size):
    scale, offset, mean = (jnp.asarray(normal(seed + i, size)) for i in range(3))
    return scale, offset, mean, jnp.abs(jnp.asarray(normal(seed + 3, size))) + 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_folded_kernel_does_what_the_layer_and_its_norm_do(has_bias, dtype):
    inputs, kernel = normal(0, 5, 6), jnp.asarray(normal(1, 6, 4)).astype(dtype)
    bias = jnp.asarray(normal(2, 4)) if has_bias else None
    scale, offset, mean, variance = norm_state(3, 4)
    with jax.numpy_dtype_promotion("strict"):
        folded, shift = fold_batch_norm(kernel, bias, scale, offset, mean, variance, 1e-3)
    assert folded.dtype == dtype and shift.dtype == (jnp.float32 if has_bias else dtype)
    wide = np.asarray(kernel, np.float64)
    hidden = inputs @ wide + (0 if bias is None else np.asarray(bias))
    expected = oracles.batch_norm(hidden, scale, offset, mean, variance, 1e-3)
    got = inputs @ np.asarray(folded, np.float64) + np.asarray(shift, np.float64)
    np.testing.assert_allclose(got, expected, atol=1e-4 if dtype == jnp.float32 else 0.15)


def test_a_norm_without_scale_or_offset_folds_too():
    kernel, one = jnp.full((2, 1), 6.0), jnp.ones(1)
    folded, bias = fold_batch_norm(kernel, None, None, None, 2 * one, 4 * one, 0.0)
    np.testing.assert_array_equal(folded, [[3.0], [3.0]])
    np.testing.assert_array_equal(bias, [-1.0])
    with pytest.raises(ValueError, match=r"mean must have shape \(1,\), .* not \(2,\)"):
        fold_batch_norm(kernel, None, None, None, jnp.ones(2), one)


class LinenNormed(linen.Module):
    """Two layers with norms: one layer without bias, one norm without offset."""

    norms: bool = True

    @linen.compact
    def __call__(self, images, train=False):
        def norm(name, **options):
            if not self.norms:
                return lambda x: x
            return linen.BatchNorm(not train, momentum=0.99, name=name, **options)

        hidden = linen.Conv(4, (3, 3), use_bias=not self.norms, name="conv")(images)
        hidden = linen.relu(norm("norm")(hidden))
        hidden = linen.Dense(3, name="head")(hidden.reshape(hidden.shape[0], -1))
        return norm("head_norm", use_bias=False, use_scale=False)(hidden)


class NnxNormed(nnx.Module):
    """The same in nnx, one level deeper."""

    def __init__(self, rngs, norms=True):
        self.conv = nnx.List([nnx.Conv(1, 4, (3, 3), use_bias=not norms, rngs=rngs)])
        self.head = nnx.Linear(64, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.99, rngs=rngs) if norms else (lambda x: x)
        self.head_norm = (
            nnx.BatchNorm(3, momentum=0.99, use_bias=False, use_scale=False, rngs=rngs)
            if norms
            else (lambda x: x)
        )

    def __call__(self, images):
        hidden = nnx.relu(self.norm(self.conv[0](images)))
        return self.head_norm(self.head(hidden.reshape(hidden.shape[0], -1)))


def _linen_normed(images):
    model, bare = LinenNormed(), LinenNormed(norms=False)
    variables = model.init(jax.random.key(0), images)

    def apply(params, statistics, x):
        return model.apply({"params": params, "batch_stats": statistics}, x)

    def apply_bare(params, x):
        return bare.apply({"params": params}, x)

    def update(params, statistics, x):
        tree = {"params": params, "batch_stats": statistics}
        return model.apply(tree, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    trees = variables["params"], variables["batch_stats"]
    return apply, apply_bare, update, trees, {"conv": "norm", "head": "head_norm"}


def _nnx_normed(images):
    del images
    graph, params, statistics = nnx.split(NnxNormed(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    bare_graph = nnx.graphdef(NnxNormed(nnx.Rngs(0), norms=False))

    def apply(params, statistics, x):
        return nnx.view(nnx.merge(graph, params, statistics), use_running_average=True)(x)

    def apply_bare(params, x):
        return nnx.merge(bare_graph, params)(x)

    def update(params, statistics, x):
        model = nnx.view(nnx.merge(graph, params, statistics), use_running_average=False)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    trees = params, statistics
    return apply, apply_bare, update, trees, {"conv/0": "norm", "head": "head_norm"}


@pytest.fixture(params=[_linen_normed, _nnx_normed])
def normed(request, images):
    """Return apply, apply of the network without norms, update, params, statistics, pairs."""
    apply, apply_bare, update, trees, pairs = request.param(images)

    def shake(leaf):
        waves = jnp.abs(jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)))
        return leaf + 0.3 * waves.reshape(leaf.shape)

    params, statistics = jax.tree.map(shake, trees)
    return jax.jit(apply), jax.jit(apply_bare), update, params, statistics, pairs


def test_a_folded_network_gives_the_outputs_of_the_network(normed, images):
    apply, apply_bare, _, params, statistics, pairs = normed
    before = jax.tree.map(jnp.copy, (params, statistics))
    expected = apply(params, statistics, images)
    folded, neutral = fold_batch_norms(params, statistics, pairs)
    chex.assert_trees_all_equal_shapes_and_dtypes((folded, neutral), (params, statistics))
    np.testing.assert_allclose(apply(folded, neutral, images), expected, rtol=1e-3, atol=1e-4)
    bare, rest = remove_batch_norms(params, statistics, pairs)
    assert type(bare) is type(params) and not jax.tree.leaves(rest)
    np.testing.assert_allclose(apply_bare(bare, images), expected, rtol=1e-3, atol=1e-4)
    assert len(jax.tree.leaves(bare)) == 4  # two kernels, two biases
    chex.assert_trees_all_equal((params, statistics), before)


def test_a_folded_network_quantizes_like_any_other(normed, images):
    apply, _, _, params, statistics, pairs = normed
    folded, neutral = fold_batch_norms(params, statistics, pairs)
    small = quant.quantize_params(folded, QuantSpec(8))
    got = apply(jopt.materialize(small), neutral, images)
    expected = apply(params, statistics, images)
    assert jnp.abs(got - expected).max() < 0.05 * jnp.abs(expected).max()


def test_folding_errors_name_what_is_missing():
    params = {"conv": {"kernel": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(3)}}
    statistics = {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
    for fold in (fold_batch_norms, remove_batch_norms):
        with pytest.raises(ValueError, match="'conv1/kernel' is not in params; .*'conv/kernel'"):
            fold(params, statistics, {"conv1": "norm"})
        with pytest.raises(ValueError, match="'bn/mean' is not in statistics; .*'norm/mean'"):
            fold(params, statistics, {"conv": "bn"})
        with pytest.raises(ValueError, match=r"conv and norm: mean must have shape \(3,\)"):
            fold(params, {"norm": {"mean": jnp.ones(2), "var": jnp.ones(3)}}, {"conv": "norm"})
        with pytest.raises(ValueError, match="a norm follows more than one layer"):
            fold(params, statistics, {"conv": "norm", "dense": "norm"})
        with pytest.raises(TypeError, match="conv/kernel is compressed"):
            fold(quant.quantize_params(params, QuantSpec(4)), statistics, {"conv": "norm"})
    with pytest.raises(TypeError, match="params must be a mapping of mappings, not list"):
        remove_batch_norms([], statistics, {"conv": "norm"})


def test_reestimated_statistics_are_those_of_all_examples(normed):
    _, _, update, params, statistics, pairs = normed
    batches = [jax.random.normal(jax.random.key(i), (6, 4, 4, 1)) + i for i in range(3)]
    new = reestimate_batch_norm(update, params, statistics, batches)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, statistics)
    kernel = (params["conv"][0] if "conv/0" in pairs else params["conv"])["kernel"]
    kernel = jax.tree.leaves(kernel)[0]

    def hidden(x):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return np.asarray(out, np.float64)

    mean, var = (jax.tree.leaves(new["norm"][name])[0] for name in ("mean", "var"))
    every = hidden(jnp.concatenate(batches))
    np.testing.assert_allclose(mean, every.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(var, every.var((0, 1, 2)), rtol=1e-4, atol=1e-4)
    averaged = reestimate_batch_norm(update, params, statistics, batches, average_statistics)
    var = jax.tree.leaves(averaged["norm"]["var"])[0]
    expected = np.mean([hidden(x).var((0, 1, 2)) for x in batches], 0)
    np.testing.assert_allclose(var, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reestimation_does_not_depend_on_momentum_or_what_was_there(momentum, dtype):
    def update(params, statistics, batch):
        new = {"mean": batch.mean(0), "var": batch.var(0)}
        mixed = {
            key: momentum * old + (1 - momentum) * new[key] for key, old in statistics["a"].items()
        }
        return {**statistics, "a": mixed}

    statistics = {
        "a": {"mean": jnp.full(2, 77.0, dtype), "var": jnp.full(2, 99.0, dtype)},
        "frozen": {"mean": jnp.full(2, 5.0)},
        "count": jnp.array(3),
    }
    batches = [100 * normal(i, 8, 2) for i in range(2)]
    new = reestimate_batch_norm(update, None, statistics, iter(batches))
    every = np.concatenate(batches).astype(np.float64)
    tolerance = 1e-3 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(new["a"]["mean"].astype(jnp.float32), every.mean(0), rtol=tolerance)
    np.testing.assert_allclose(new["a"]["var"].astype(jnp.float32), every.var(0), rtol=tolerance)
    assert new["a"]["mean"].dtype == dtype
    np.testing.assert_array_equal(new["frozen"]["mean"], [5.0, 5.0])
    assert new["count"] == 3


def test_reestimation_says_what_is_wrong():
    statistics = {"mean": jnp.zeros(2)}
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(lambda p, s, x: s, None, statistics, [])
    with pytest.raises(ValueError, match="update changed no average: .* training mode"):
        reestimate_batch_norm(lambda p, s, x: s, None, statistics, [jnp.ones(2)])
    with pytest.raises(ValueError, match="update must return statistics of structure"):
        reestimate_batch_norm(lambda p, s, x: {}, None, statistics, [jnp.ones(2)])
    with pytest.raises(ValueError, match="no floating-point leaf"):
        reestimate_batch_norm(lambda p, s, x: s, None, {"n": jnp.array(1)}, [jnp.ones(2)])


def test_reestimation_works_on_many_networks_at_once():
    batches = [jnp.asarray(normal(i, 5, 2)) for i in range(2)]

    def update(params, statistics, batch):
        hidden = batch * params[None, :]
        new = {"mean": hidden.mean(0), "var": hidden.var(0)}
        return {key: 0.9 * old + 0.1 * new[key] for key, old in statistics.items()}

    statistics = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    params = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), statistics)
    many = jax.jit(
        jax.vmap(lambda p, s: reestimate_batch_norm(update, p, s, batches), in_axes=(0, 0))
    )(params, stacked)
    one = reestimate_batch_norm(update, params[1], statistics, batches)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], many), one, rtol=1e-4)
