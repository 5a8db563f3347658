"""One battery for every algorithm: to add an algorithm, add a row.

Each row goes through the same checks on a linen dict and on an nnx State: jitted equals eager,
vmapped equals one by one, strict dtypes, the input untouched, the structure kept, and a round trip
through a file.
"""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import codec, distill, layers, prune, quant
from jopt._trees import map_selected
from jopt.quant import QuantSpec

_GRIDS = {
    "log2": (4, quant.logarithmic(2.0)),
    "log_sqrt2_mean": (5, quant.logarithmic(2**0.5, quant.arithmetic_mean)),
    "additive_powers": (4, quant.additive_powers_of_two),
    "nf4": (4, quant.nf4),
    "codebook": (2, quant.codebook((-1.0, 0.0, 0.5))),
    "ternary": (2, quant.ternary),
    "ternary_optimal": (2, quant.ternary_optimal),
    "binary": (1, quant.binary),
    "e4m3": (8, quant.e4m3),
    "e5m2": (8, quant.e5m2),
}
_BLOCK_FLOATS = {
    "mxfp4": (4, 32, quant.mxfp4),
    "mxfp6_e2m3": (6, 32, quant.mxfp6_e2m3),
    "mxfp6_e3m2": (6, 32, quant.mxfp6_e3m2),
    "mxfp8_e4m3": (8, 32, quant.mxfp8_e4m3),
    "mxfp8_e5m2": (8, 32, quant.mxfp8_e5m2),
    "nvfp4": (4, 16, quant.nvfp4),
}
_RANGES = {"percentile": quant.percentile(99.0), "mse": quant.mse, "entropy": quant.entropy(4)}
_affine = partial(QuantSpec, range=quant.minmax, grid=quant.affine)
_affine_zero = partial(QuantSpec, range=quant.minmax, grid=quant.affine_zero)


def _masked(select, score):
    return lambda params: prune.apply_masks(params, select(score(params)))


_random = partial(prune.random_scores, jax.random.key(0))


def _lsq(params):
    steps = quant.init_steps(params, QuantSpec(3))
    return quant.lsq_quantize_params(params, steps, QuantSpec(3))


def _by_method(method, spec):
    """Quantize the kernels by a method after training that needs no data."""

    def transform(params):
        return map_selected(lambda path, leaf: method(leaf, None, spec)[0], params)

    return transform


def _statistics(features):
    """Return the statistics of inputs that depend on each other."""
    keys = jax.random.split(jax.random.key(5))
    mix = jnp.eye(features) + 0.3 * jax.random.normal(keys[0], (features, features))
    rows = jax.random.normal(keys[1], (4 * features, features)) @ mix
    sums = layers.input_statistics.update(layers.input_statistics.init(features), rows)
    return layers.input_statistics.finalise(sums)


def _calibrated(method, spec):
    """Quantize the kernels by a method after training, with inputs of their own."""

    def transform(params):
        kernels = quant.init_steps(params, spec, init=lambda leaf, spec: leaf)
        statistics = {
            path: _statistics(leaf.size // leaf.shape[-1]) for path, leaf in kernels.items()
        }
        return quant.quantize_calibrated_params(params, statistics, spec, method)[0]

    return transform


def _lsq_plus(params):
    def transform(path, leaf):
        step, offset = quant.lsq_plus_init(leaf, QuantSpec(3))
        return quant.lsq_plus_quantize(leaf, step, offset, QuantSpec(3))

    return map_selected(transform, params)


def _scaled(params):
    """Put codes of scaled inputs behind a factor, as AWQ leaves them."""

    def transform(path, leaf):
        factor = 1 + jnp.arange(leaf.shape[-2], dtype=leaf.dtype)
        factor = factor.reshape((1,) * (leaf.ndim - 2) + (-1, 1))
        return jopt.ScaledTensor(quant.quantize(leaf * factor, QuantSpec(4)), 1 / factor)

    return map_selected(transform, params)


# Functions from parameters to parameters.
TRANSFORMS = {
    **{f"symmetric_{b}": partial(quant.quantize_params, spec=QuantSpec(b)) for b in (1, 2, 4, 8)},
    "symmetric_tensor": partial(quant.quantize_params, spec=QuantSpec(3, ())),
    "symmetric_group": partial(quant.quantize_params, spec=QuantSpec(4, (1, 1))),
    **{f"affine_{b}": partial(quant.quantize_params, spec=_affine(b)) for b in (1, 4, 8)},
    "affine_zero": partial(quant.quantize_params, spec=_affine_zero(5)),
    "biases_too": partial(quant.quantize_params, spec=QuantSpec(8, ()), where=".*"),
    "fake_symmetric": partial(quant.fake_quantize_params, spec=QuantSpec(4)),
    "fake_affine": partial(quant.fake_quantize_params, spec=_affine(4)),
    **{
        f"grid_{name}": partial(quant.quantize_params, spec=QuantSpec(bits, grid=grid))
        for name, (bits, grid) in _GRIDS.items()
    },
    **{
        f"grid_{name}": partial(
            quant.quantize_params, spec=QuantSpec(bits, (size, 1), grid=grid), where="hidden/kernel"
        )
        for name, (bits, size, grid) in _BLOCK_FLOATS.items()
    },
    **{
        f"range_{name}": partial(quant.quantize_params, spec=QuantSpec(4, range=each))
        for name, each in _RANGES.items()
    },
    "grid_kmeans": partial(
        quant.quantize_params, spec=QuantSpec(3, (), grid=quant.kmeans), where="head/kernel"
    ),
    "fake_nf4": partial(quant.fake_quantize_params, spec=QuantSpec(4, grid=quant.nf4)),
    "binarized": quant.binarize_params,
    "fake_binarized": quant.fake_binarize_params,
    "dorefa": partial(quant.dorefa_quantize_params, spec=QuantSpec(2)),
    "dorefa_trained": partial(quant.dorefa_params, spec=QuantSpec(2)),
    "lsq": _lsq,
    "ttq": lambda params: quant.ttq_quantize_params(params, quant.ttq_init_params(params)),
    "hqq": _by_method(quant.hqq, _affine(3)),
    "hadamard": _by_method(quant.hadamard_rotation, QuantSpec(4)),
    "gptq": _calibrated(quant.gptq, QuantSpec(3)),
    "awq": _calibrated(quant.awq, _affine(3)),
    "smooth_quant": _calibrated(quant.smooth_quant, QuantSpec(4)),
    "weighted": _calibrated(quant.quantize_weighted, QuantSpec(3)),
    "lsq_plus": _lsq_plus,
    "scaled": _scaled,
    "layer_magnitude": _masked(partial(prune.topk_masks, sparsity=0.9), prune.magnitude_scores),
    "global_magnitude": _masked(
        partial(prune.global_topk_masks, sparsity=0.9), prune.magnitude_scores
    ),
    "lamp": _masked(partial(prune.global_topk_masks, sparsity=0.9), prune.lamp_scores),
    "fpgm": _masked(partial(prune.topk_masks, sparsity=0.5), prune.fpgm_scores),
    "filter_norms": _masked(partial(prune.topk_masks, sparsity=0.5), prune.filter_norm_scores),
    "output_magnitude": _masked(
        partial(prune.output_topk_masks, sparsity=0.6), prune.magnitude_scores
    ),
    "layer_random": _masked(partial(prune.topk_masks, sparsity=0.5), _random),
    "global_random": _masked(partial(prune.global_topk_masks, sparsity=0.5), _random),
    "two_of_four": _masked(lambda scores: prune.n_m_masks(scores, 2, 4)[0], prune.magnitude_scores),
    "output_channels": _masked(
        lambda scores: prune.block_topk_masks(scores, 0.5, (1,)), prune.magnitude_scores
    ),
    "global_blocks": _masked(
        lambda scores: prune.block_topk_masks(scores, 0.5, (-1, 1), select=prune.global_topk_masks),
        prune.magnitude_scores,
    ),
    "erdos_renyi": _masked(
        lambda scores: prune.topk_masks(scores, prune.erdos_renyi_kernel_sparsities(scores, 0.5)),
        prune.magnitude_scores,
    ),
    "prune_then_quantize": lambda params: quant.quantize_params(
        _masked(partial(prune.topk_masks, sparsity=0.9), prune.magnitude_scores)(params),
        QuantSpec(4),
    ),
}


@cache
def _run(name):
    """Return a transform followed by what it stands for, and the same compiled, for all tests."""

    def run(params):
        return jopt.materialize(TRANSFORMS[name](params))

    return run, jax.jit(run)


# Random scores would share their key; the divergence of nine values has ties, which fall to the
# one side or the other with the order of a sum.
VMAPPED = [name for name in TRANSFORMS if "random" not in name and name != "range_entropy"]

LOSSES = {
    "soft_cross_entropy": lambda s, t, y: distill.soft_cross_entropy(s, t, 4.0),
    "distillation_loss": lambda s, t, y: distill.distillation_loss(s, t, y, 4.0, 0.9),
    "hard_only": lambda s, t, y: distill.distillation_loss(s, t, y, 1.0, 0.0),
}


def bits_of(tree):
    """Return every array of a tree as raw bytes, to compare without tolerance."""
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("name", "network"),
    [(name, "linen") for name in TRANSFORMS] + [(name, "nnx") for name in list(TRANSFORMS)[::12]],
    indirect=["network"],
)
def test_jitted_equals_eager_and_the_input_is_untouched(name, network):
    _, params = network
    before = jax.tree.map(jnp.copy, params)
    with jax.numpy_dtype_promotion("strict"):
        eager, jitted = (run(params) for run in _run(name))
    chex.assert_trees_all_close(jitted, eager, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, params)
    chex.assert_trees_all_equal_structs(eager, params)
    chex.assert_trees_all_equal(params, before)


@pytest.mark.parametrize("network", ["linen"], indirect=True)  # a State's leaves are the same
@pytest.mark.parametrize("name", VMAPPED)
def test_vmapped_equals_one_by_one(name, network):
    _, params = network
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf + 0.1, -leaf]), params)
    run, single = _run(name)
    with jax.numpy_dtype_promotion("strict"):  # as above, so that what was compiled there serves
        together = jax.jit(jax.vmap(run))(stacked)
        ones = [single(jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(3)]
    for index in range(3):
        got = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close(got, ones[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "network"),
    [(name, "linen") for name in TRANSFORMS] + [(name, "nnx") for name in list(TRANSFORMS)[::6]],
    indirect=["network"],
)
def test_what_was_saved_comes_back_bit_for_bit(name, network, images, tmp_path):
    apply, params = network
    with jax.numpy_dtype_promotion("strict"):  # as above, where all of it was compiled
        changed = TRANSFORMS[name](params)
    codec.save(tmp_path / "net.jopt", changed)
    codec.verify(tmp_path / "net.jopt", changed)
    loaded = codec.load(tmp_path / "net.jopt", like=changed)
    chex.assert_trees_all_equal_structs(loaded, changed)
    assert bits_of(loaded) == bits_of(changed)
    with jax.numpy_dtype_promotion("strict"):
        restored = [jopt.materialize(tree) for tree in (loaded, changed)]
    outputs = [apply(tree, images) for tree in restored]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_per_example_finite_and_the_same_however_they_are_run(name, variant):
    student = 50 * jax.random.normal(jax.random.key(0), (6, 5))
    teacher = 50 * jax.random.normal(jax.random.key(1), (6, 5))
    labels = jnp.arange(6) % 5
    with jax.numpy_dtype_promotion("strict"):
        loss = variant(LOSSES[name])(student, teacher, labels)
    assert loss.shape == (6,) and bool(jnp.isfinite(loss).all()) and bool((loss >= 0).all())
    chex.assert_trees_all_close(jax.vmap(LOSSES[name])(student, teacher, labels), loss, rtol=1e-5)
    gradient = variant(jax.grad(lambda s: LOSSES[name](s, teacher, labels).sum()))(student)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(gradient.sum(-1), jnp.zeros(6), atol=1e-4)  # logits shift freely
