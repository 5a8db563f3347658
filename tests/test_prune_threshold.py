"""Exact selection of the largest scores, against a stable sort in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jopt.prune import _counting
from jopt.prune._threshold import keep_largest, keep_largest_global, keep_largest_of_leaf

pytestmark = pytest.mark.usefixtures("selection")
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
LENGTH = 37
SPECIAL = [0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-45, -1e-45, 6e-8, 1.0, -1.0, 1 + 2**-23]


def oracle(scores, keep):
    """Sort stably: NaN last, then by falling score, then by rising index."""
    flat = np.asarray(jnp.asarray(scores)).astype(np.float64).reshape(-1)
    missing = np.isnan(flat)
    order = np.lexsort((np.arange(flat.size), -np.where(missing, -np.inf, flat), missing))
    mask = np.zeros(flat.size, bool)
    mask[order[: int(np.clip(keep, 0, flat.size))]] = True
    return mask.reshape(np.shape(scores))


def check(scores, keep):
    np.testing.assert_array_equal(keep_largest(scores, keep), oracle(scores, keep))


def keeps(size):
    return sorted({-3, 0, 1, size // 10, size // 2, size - 1, size, size + 9})


def distributions():
    rng = np.random.default_rng(0)
    size = 150_000  # more than one chunk, and no multiple of anything
    normal = rng.normal(size=size + 1)
    lengths = np.abs(normal)
    return {
        "normal": normal,
        "constant": np.full(size, -2.5),
        "zeros": np.zeros(size),
        "two values": rng.integers(0, 2, size),
        "integers": rng.integers(-50, 50, size),
        "pruned": np.where(lengths > np.quantile(lengths, 0.9), lengths, 0),
        "rare": np.where(rng.random(size) < 0.001, normal[:size], 0),
        "heavy tails": np.sign(normal) * np.exp(15 * lengths.clip(0, 5)),
        "denormals": rng.integers(-9, 9, size) * 2.0**-149,
        "near denormals": normal * 2.0**-130,
        "two clusters": np.where(normal > 0, 1e30, 1e-30)
        * (1 + rng.integers(0, 9, size + 1) * 2.0**-20),
        "rising": np.arange(size),
        "outlier": np.append(np.zeros(size), 3e38),
        "nan": np.where(normal > 0, np.nan, normal),
    }


@given(
    values=st.lists(
        st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=LENGTH, max_size=LENGTH
    ),
    keep=st.integers(-2, LENGTH + 2),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_a_stable_sort_for_any_floats(values, keep, dtype):
    with np.errstate(all="ignore"):
        scores = jnp.asarray(np.array(values, np.float32).astype(dtype))
    check(scores, keep)


@given(
    values=st.lists(st.integers(-2, 2), min_size=LENGTH, max_size=LENGTH),
    keep=st.integers(0, LENGTH),
    dtype=st.sampled_from(DTYPES),
)
def test_ties_go_to_the_lower_index(values, keep, dtype):
    scores = jnp.asarray(np.array(values).astype(dtype))
    check(scores, keep)
    assert int(keep_largest(scores, keep).sum()) == keep


@pytest.mark.parametrize("name", distributions())
def test_exact_on_adversarial_distributions(name):
    scores = jnp.asarray(distributions()[name].astype(np.float32))
    for keep in keeps(scores.size):
        check(scores, keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5), (4096,), (4097,), (131073,)])
def test_exact_at_edge_sizes(shape, dtype):
    scores = jax.random.normal(jax.random.key(0), shape, dtype)
    for keep in keeps(scores.size):
        check(scores, keep)


@pytest.mark.parametrize("width", [5, 300, 4500])
def test_vmap_equals_a_loop_each_row_with_its_own_keep(width):
    scores = jnp.round(jax.random.normal(jax.random.key(1), (6, width)), 1)
    scores = scores.at[2].set(0.0)
    keep = jnp.array([0, 1, width // 3, width // 2, width - 1, width])
    masks = jax.vmap(keep_largest)(scores, keep)
    for row in range(6):
        np.testing.assert_array_equal(masks[row], oracle(scores[row], keep[row]))


def test_traced_keep_compiles_once():
    traces = []

    @jax.jit
    def mask(scores, keep):
        traces.append(None)
        return keep_largest(scores, keep)

    scores = jax.random.normal(jax.random.key(2), (20, 30))
    for keep in (0, 7, 300, 600):
        np.testing.assert_array_equal(mask(scores, keep), oracle(scores, keep))
    assert len(traces) == 1


def test_runs_in_a_scan():
    scores = jax.random.normal(jax.random.key(3), (50,))
    keep = jnp.arange(0, 51, 10)
    masks = jax.lax.scan(lambda carry, k: (carry, keep_largest(scores, k)), None, keep)[1]
    np.testing.assert_array_equal(masks.sum(axis=1), keep)


def test_no_gradient_flows():
    def loss(scores):
        return jnp.sum(scores * keep_largest(scores, 2))

    scores = jnp.array([3.0, -1.0, 2.0, 0.5])
    np.testing.assert_array_equal(jax.grad(loss)(scores), [1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("decimals", [1, 8])
@pytest.mark.parametrize("dtypes", [[jnp.float32], DTYPES])
def test_global_equals_the_concatenation(dtypes, decimals):
    # Large leaves (windows) and small ones (packed) alternate, so ties cross both kinds.
    shapes = [(7,), (300, 500), (), (0,), (64, 1000), (3, 3, 4, 5), (140_000,), (9,)]
    keys = jax.random.split(jax.random.key(4), len(shapes))
    leaves = [
        jnp.round(jax.random.normal(key, shape), decimals).astype(dtypes[i % len(dtypes)])
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    ]
    together = np.concatenate([np.asarray(leaf).astype(np.float32).reshape(-1) for leaf in leaves])
    for keep in keeps(together.size):
        masks = keep_largest_global(leaves, keep)
        assert [mask.shape for mask in masks] == shapes
        found = np.concatenate([np.asarray(mask).reshape(-1) for mask in masks])
        np.testing.assert_array_equal(found, oracle(together, keep))


def test_global_of_nothing_is_nothing():
    assert keep_largest_global([], 3) == []


def test_float64_is_compared_in_full():
    with jax.enable_x64(True):
        scores = jnp.asarray(1 + np.random.default_rng(0).permutation(5000) * 2.0**-50)
        assert scores.dtype == jnp.float64
        for keep in keeps(scores.size):
            check(scores, keep)


@pytest.mark.parametrize("ties", [False, True])
def test_chunked_and_plain_counting_agree(ties):
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.integers(-3, 4, n).astype(np.float32)) for n in (5, 140_000, 90)]
    keys = _counting.order_keys(jnp.arange(-3.0, 4.0), jnp.dtype(jnp.int32))
    probes = jnp.array([1, 70, 9000, 100_000], jnp.int32) if ties else keys[jnp.array([1, 2, 3, 5])]
    low, high = (jnp.int32(0), jnp.int32(140_095)) if ties else (keys[0], keys[6])
    query = _counting.Query(jnp.array(ties), keys[4], probes, low, high)
    chunked = _counting._count_chunks(leaves, query)
    plain = _counting._count_plain(leaves, query)
    for one, other in zip(chunked, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_strict_promotion_is_no_obstacle():
    with jax.numpy_dtype_promotion("strict"):
        assert int(keep_largest(jnp.arange(30.0), jnp.uint8(4)).sum()) == 4


def test_refuses_integers_and_fractions():
    with pytest.raises(TypeError, match="floating-point"):
        keep_largest(jnp.arange(3), 1)
    with pytest.raises(TypeError, match="keep must be an integer"):
        keep_largest(jnp.arange(3.0), 0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(0,), (3, 2), (4096,), (17, 241), (130, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leaf_that_is_filled_up_keeps_what_it_would_keep_alone(shape, dtype):
    rng = np.random.default_rng(1)
    drawn = rng.integers(-3, 4, shape).astype(np.float64)
    scores = jnp.asarray(np.where(rng.random(shape) < 0.2, np.nan, drawn), dtype)
    for keep in keeps(scores.size):
        expected = oracle(scores, keep)
        np.testing.assert_array_equal(keep_largest_of_leaf(scores, keep), expected)
        jitted = jax.jit(keep_largest_of_leaf)(scores, keep)
        np.testing.assert_array_equal(jitted, expected)


def test_leaves_of_many_shapes_are_compiled_for_few_lengths(selection):
    if selection == "by kernel":
        pytest.skip("the kernel takes every shape as it is")
    jax.clear_caches()
    for length in range(40, 60):
        keep_largest_of_leaf(jnp.ones((length, 3)), 5)
    compiled: Any = keep_largest
    assert compiled._cache_size() == 1
