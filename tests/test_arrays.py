import chex
import jax
import jax.numpy as jnp
import pytest
from flax import serialization

import jopt
from jopt import quant
from jopt._arrays import dtype_bits, expand_blocks
from jopt.quant import QuantSpec


def test_materialize_keeps_plain_leaves_and_structure(network, images, variant):
    apply, params = network
    small = quant.quantize_params(params, QuantSpec(8))
    restored = variant(jopt.materialize)(small)
    chex.assert_trees_all_equal_structs(restored, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, params)
    assert jnp.abs(apply(restored, images) - apply(params, images)).max() < 0.1


def test_materialize_of_a_plain_tree_is_the_tree(network):
    _, params = network
    chex.assert_trees_all_equal(jopt.materialize(params), params)


@pytest.mark.parametrize(
    ("counts", "shape"),
    [((2, 3), (4, 3)), ((1, 1), (4, 3)), ((4, 3), (4, 3)), ((), ()), ((2,), (6,))],
)
def test_expand_blocks_repeats_each_value_over_its_block(counts, shape):
    values = jnp.arange(max(1, jnp.zeros(counts).size), dtype=jnp.float32).reshape(counts)
    expected = values
    for axis, (count, size) in enumerate(zip(counts, shape, strict=True)):
        expected = jnp.repeat(expected, size // count, axis)
    chex.assert_trees_all_equal(expand_blocks(values, shape), expected)


def test_expand_blocks_refuses_blocks_that_do_not_divide():
    with pytest.raises(ValueError, match=r"blocks \(3,\) do not divide shape \(4,\)"):
        expand_blocks(jnp.ones(3), (4,))


def test_nbytes_counts_packed_codes():
    leaf = quant.quantize(jnp.ones((64, 10)), QuantSpec(4))
    assert jopt.nbytes(leaf) == 64 * 10 // 2 + 10 * 4
    assert jopt.nbytes({"a": jnp.zeros((3, 5), jnp.int2)}) == 4  # 30 bits
    assert jopt.nbytes({"mask": jnp.ones(9, bool), "none": None}) == 9
    assert jopt.nbytes({}) == 0


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("int2", 2), ("uint4", 4), ("int8", 8), ("bool", 8), ("bfloat16", 16), ("float32", 32)],
)
def test_dtype_bits(dtype, bits):
    assert dtype_bits(jnp.dtype(dtype)) == bits


def test_scan_over_stacked_compressed_layers_equals_a_loop():
    kernels = jax.random.normal(jax.random.key(0), (3, 4, 4))
    stacked = jax.vmap(lambda kernel: quant.quantize(kernel, QuantSpec(4, (2, 1))))(kernels)
    start = jnp.ones((1, 4))

    def layer(x, leaf):
        return jnp.tanh(x @ jopt.materialize(leaf)), None

    scanned, _ = jax.lax.scan(layer, start, stacked)
    looped = start
    for index in range(3):
        looped, _ = layer(looped, jax.tree.map(lambda array, i=index: array[i], stacked))
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5)


def test_compressed_leaves_survive_flax_serialization():
    leaf = quant.quantize(jnp.linspace(-1, 1, 12).reshape(3, 4), QuantSpec(4))
    restored = serialization.from_bytes(leaf, serialization.to_bytes(leaf))
    chex.assert_trees_all_equal(jopt.materialize(restored), jopt.materialize(leaf))


def test_qtensor_knows_the_array_it_stands_for():
    leaf = quant.quantize(jnp.ones((3, 4), jnp.bfloat16), QuantSpec(4))
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == ((3, 4), 2, 12, jnp.bfloat16)
