"""One battery for every algorithm: to add an algorithm, add a row.

Each row goes through the same checks on a linen dict and on an nnx State: jitted equals eager,
vmapped equals one by one, strict dtypes, the input untouched, the structure kept, and a round trip
through a file.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import codec, distill, prune, quant
from jopt.quant import QuantSpec

_affine = partial(QuantSpec, range=quant.minmax, grid=quant.affine)
_affine_zero = partial(QuantSpec, range=quant.minmax, grid=quant.affine_zero)


def _masked(select, score):
    return lambda params: prune.apply_masks(params, select(score(params)))


_random = partial(prune.random_scores, jax.random.key(0))

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
    "layer_magnitude": _masked(partial(prune.topk_masks, sparsity=0.9), prune.magnitude_scores),
    "global_magnitude": _masked(
        partial(prune.global_topk_masks, sparsity=0.9), prune.magnitude_scores
    ),
    "layer_random": _masked(partial(prune.topk_masks, sparsity=0.5), _random),
    "global_random": _masked(partial(prune.global_topk_masks, sparsity=0.5), _random),
    "prune_then_quantize": lambda params: quant.quantize_params(
        _masked(partial(prune.topk_masks, sparsity=0.9), prune.magnitude_scores)(params),
        QuantSpec(4),
    ),
}
VMAPPED = [name for name in TRANSFORMS if "random" not in name]  # scores would share their key

LOSSES = {
    "soft_cross_entropy": lambda s, t, y: distill.soft_cross_entropy(s, t, 4.0),
    "distillation_loss": lambda s, t, y: distill.distillation_loss(s, t, y, 4.0, 0.9),
    "hard_only": lambda s, t, y: distill.distillation_loss(s, t, y, 1.0, 0.0),
}


def bits_of(tree):
    """Return every array of a tree as raw bytes, to compare without tolerance."""
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_jitted_equals_eager_and_the_input_is_untouched(name, network):
    _, params = network
    before = jax.tree.map(jnp.copy, params)
    with jax.numpy_dtype_promotion("strict"):
        eager = jopt.materialize(TRANSFORMS[name](params))
        jitted = jax.jit(lambda p: jopt.materialize(TRANSFORMS[name](p)))(params)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, params)
    chex.assert_trees_all_equal_structs(eager, params)
    chex.assert_trees_all_equal(params, before)


@pytest.mark.parametrize("name", VMAPPED)
def test_vmapped_equals_one_by_one(name, network):
    _, params = network
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf + 0.1, -leaf]), params)
    together = jopt.materialize(jax.vmap(TRANSFORMS[name])(stacked))
    for index in range(3):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], stacked)
        alone = jopt.materialize(TRANSFORMS[name](one))
        got = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close(got, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_was_saved_comes_back_bit_for_bit(name, network, images, tmp_path):
    apply, params = network
    changed = TRANSFORMS[name](params)
    codec.save(tmp_path / "net.jopt", changed)
    codec.verify(tmp_path / "net.jopt", changed)
    loaded = codec.load(tmp_path / "net.jopt", like=changed)
    chex.assert_trees_all_equal_structs(loaded, changed)
    assert bits_of(loaded) == bits_of(changed)
    outputs = [apply(jopt.materialize(tree), images) for tree in (loaded, changed)]
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
