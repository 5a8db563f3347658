"""One-dimensional k-means: against the exact optimum, and on all the data that breaks others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.quant._kmeans import (
    lloyd,
    optimal_codebook,
    optimal_codebook_with_zero,
    tied_gradient,
)
from jopt.quant._kmeans_starts import density_codebook, linear_codebook, random_codebook
from jopt.quant._nearest import nearest_codes
from tests.oracles_kmeans import error, exact_error, lloyd_steps, nearest, slow_exact_error

SHORT, LONG = 3000, 12000  # below and above the length up to which values are sorted


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def draw(name, size, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.random(size)
    values = {
        "normal": lambda: rng.normal(size=size) * 0.05,
        "laplace": lambda: rng.laplace(size=size),
        "student": lambda: rng.standard_t(2, size=size),
        "sparse": lambda: rng.normal(size=size) * (parts < 0.1),
        "relu": lambda: np.maximum(rng.normal(size=size), 0),
        "uniform": lambda: parts,
        "offset": lambda: 1000 + rng.normal(size=size),
        "lognormal": lambda: rng.lognormal(0, 2, size),
        "modes": lambda: np.select(
            [parts < 0.3, parts < 0.6],
            [5 + 0.01 * rng.normal(size=size), -1 + 0.3 * rng.normal(size=size)],
            0.001 * parts,
        ),
        "rounded": lambda: np.asarray(jnp.asarray(rng.normal(size=size), jnp.bfloat16), np.float64),
        "tiny": lambda: rng.normal(size=size) * 1e-30,
        "huge": lambda: rng.normal(size=size) * 1e30,
    }[name]()
    return values.astype(np.float32)


NAMES = ["normal", "laplace", "student", "sparse", "relu", "uniform"]
NAMES += ["offset", "lognormal", "modes", "rounded", "tiny", "huge"]


def gap(values, count, codebook, weights=None):
    return error(values, codebook, weights) / exact_error(values, count, weights) - 1


def test_the_oracles_agree():
    for seed, count in ((0, 1), (1, 3), (2, 7)):
        values = draw("student", 40, seed)
        np.testing.assert_allclose(
            exact_error(values, count), slow_exact_error(values, count), rtol=1e-9
        )


@pytest.mark.parametrize(
    ("size", "count", "names"),
    [
        (SHORT, 2, NAMES),
        (SHORT, 16, NAMES),
        (SHORT, 256, ["student", "sparse"]),
        (LONG, 2, NAMES[::2]),
        (LONG, 16, NAMES[1::2]),
        (LONG, 256, ["modes"]),
    ],
)
def test_the_error_is_within_a_ten_thousandth_of_the_optimum(size, count, names):
    for seed, name in enumerate(names):
        values = draw(name, size, seed)
        assert gap(values, count, optimal_codebook(jnp.asarray(values), count)) < 1e-4, name


def test_other_numbers_of_entries_are_optimal_as_well():
    for size, count in ((SHORT, 1), (LONG, 64)):
        values = draw("modes", size, 100)
        assert gap(values, count, optimal_codebook(jnp.asarray(values), count)) < 1e-4


def test_a_million_weights_beat_lloyd_and_lose_nothing_to_bins():
    values = jax.random.normal(jax.random.key(0), (1 << 20,))
    found = error(values, optimal_codebook(values, 16))
    # The optimal 16-level quantizer of a normal density (Max 1960, table 1) has error 0.009497.
    assert abs(found / float(jnp.var(values)) - 0.009497) < 5e-5
    assert error(values, lloyd(values, linear_codebook(values, 16), 20)) > 1.2 * found


@pytest.mark.parametrize("size", [SHORT, LONG])
@pytest.mark.parametrize("different", [1, 2, 11, 16])
def test_few_different_values_are_kept_exactly(size, different):
    rng = np.random.default_rng(different)
    levels = rng.standard_cauchy(different).astype(np.float32)
    values = jnp.asarray(levels[np.arange(size) % different])
    codebook = optimal_codebook(values, 16)
    assert set(np.asarray(codebook).tolist()) == set(levels.tolist())
    assert error(values, codebook) == 0


def test_values_that_share_a_bin_are_told_apart_while_entries_are_left():
    near = np.float32(1) + np.arange(5, dtype=np.float32) * np.float32(2**-23)
    levels = np.concatenate([near, -near, np.asarray([300, 1e-20, 0, 1e38], np.float32)])
    values = levels[np.arange(LONG) % levels.size]
    codebook = optimal_codebook(jnp.asarray(values), 16)
    assert error(values, codebook) == 0


def test_rare_values_among_zeros_are_kept_exactly():
    values = np.zeros(1 << 20, np.float32)
    values[np.arange(12) * 80_011] = draw("normal", 12)
    assert error(values, optimal_codebook(jnp.asarray(values), 16)) == 0


@pytest.mark.parametrize("size", [1, 2, 7])
def test_an_array_shorter_than_the_codebook_is_kept_exactly(size):
    values = draw("normal", size)
    codebook = np.asarray(optimal_codebook(jnp.asarray(values), 16))
    assert codebook.shape == (16,) and np.isfinite(codebook).all()
    np.testing.assert_array_equal(np.unique(codebook), np.sort(values))


def test_the_order_and_the_shape_of_the_values_do_not_matter():
    values = draw("student", SHORT)
    first = optimal_codebook(jnp.asarray(values), 16)
    second = optimal_codebook(jnp.asarray(values[::-1].reshape(50, -1)), 16)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert (jnp.diff(first) > 0).all()


def test_a_power_of_two_scales_the_codebook_exactly():
    values = jnp.asarray(draw("laplace", SHORT))
    np.testing.assert_array_equal(
        optimal_codebook(values * 2.0**60, 16), optimal_codebook(values, 16) * 2.0**60
    )


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_weights_count(size):
    rng = np.random.default_rng(3)
    values = draw("laplace", size)
    weights = rng.exponential(size=size).astype(np.float32) * (rng.random(size) < 0.7)
    codebook = optimal_codebook(jnp.asarray(values), 16, jnp.asarray(weights))
    assert gap(values, 16, codebook, weights) < 1e-4
    tiny = optimal_codebook(jnp.asarray(values), 16, jnp.asarray(weights) * 2.0**-90)
    np.testing.assert_allclose(tiny, codebook, rtol=1e-5)
    few = jnp.where(jnp.arange(size) < 16, 1.0, 0.0)
    assert error(values[:16], optimal_codebook(jnp.asarray(values), 16, few)) == 0


def test_whole_weights_equal_repeated_values():
    values = draw("normal", SHORT)
    repeats = np.where(np.arange(SHORT) < SHORT // 2, np.arange(SHORT) % 5, 0)
    weighted = optimal_codebook(jnp.asarray(values), 16, jnp.asarray(repeats, jnp.float32))
    repeated = optimal_codebook(jnp.asarray(np.repeat(values, repeats)), 16)
    assert repeats.sum() == SHORT
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [SHORT, LONG])
def test_a_value_that_is_not_finite_gives_nan_everywhere(bad, size):
    values = draw("normal", size)
    values[size // 2 + 1] = bad
    assert np.isnan(optimal_codebook(jnp.asarray(values), 16)).all()
    assert np.isnan(optimal_codebook_with_zero(jnp.asarray(values), 16)).all()
    assert (nearest_codes(jnp.asarray(values), jnp.full(300, jnp.nan)) == 0).all()


def test_weights_that_are_nan_or_all_zero_give_nan():
    values = jnp.asarray(draw("normal", SHORT))
    assert np.isnan(optimal_codebook(values, 16, jnp.zeros_like(values))).all()
    weights = jnp.ones_like(values).at[5].set(jnp.nan)
    assert np.isnan(optimal_codebook(values, 16, weights)).all()


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_pruned_weights_keep_an_exact_zero_of_their_own(size):
    values = draw("sparse", size)
    codebook = optimal_codebook_with_zero(jnp.asarray(values), 16)
    assert (codebook == 0).sum() == 1
    codes = np.asarray(nearest_codes(jnp.asarray(values), codebook))
    assert (np.asarray(codebook)[codes[values == 0]] == 0).all()
    others = values[values != 0]
    without = np.delete(np.asarray(codebook), np.flatnonzero(codebook == 0)[0])
    assert gap(others, 15, without) < 1e-4


def test_without_zeros_no_entry_is_spent_on_them():
    values = jnp.asarray(draw("normal", LONG))
    codebook = optimal_codebook_with_zero(values, 16)
    assert gap(values, 16, codebook) < 1e-4
    assert (codebook != 0).all()


def test_zero_is_kept_in_every_corner():
    alone = optimal_codebook_with_zero(jnp.array([0.0, -0.0, 0.0, 0.0]), 16)
    np.testing.assert_array_equal(alone, np.zeros(16))
    assert not np.signbit(alone).any()
    few = optimal_codebook_with_zero(jnp.array([-0.0, 2.0, 2.0, -1.0]), 16)
    np.testing.assert_array_equal(np.unique(few), [-1, 0, 2])
    pair = optimal_codebook_with_zero(jnp.array([0.0, -1.0, 3.0, 3.0]), 2)
    assert 0.0 in pair.tolist()


@pytest.mark.parametrize("count", [1, 2, 16, 32, 33, 256, 1000])
def test_codes_are_those_of_the_nearest_entry(count):
    rng = np.random.default_rng(count)
    for spread in (lambda x: x, np.sinh, lambda x: 1000 + 0.001 * x):
        codebook = np.sort(spread(3 * rng.normal(size=count)).astype(np.float32))
        midpoints = (codebook[1:].astype(np.float64) + codebook[:-1]) / 2
        near = midpoints.astype(np.float32)
        values = [spread(3 * rng.normal(size=999)), codebook, near, [0.0, -0.0, 1e6, -1e6]]
        values += [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
        values = np.concatenate(values).astype(np.float32)
        codes = nearest_codes(jnp.asarray(values), jnp.asarray(codebook))
        codes = np.asarray(codes)
        assert codes.dtype == (jnp.uint8 if count <= 256 else jnp.uint16)
        expected = nearest(values, codebook)
        np.testing.assert_array_equal(codebook[codes], codebook[expected])
        if np.unique(codebook).size == count:
            np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("size", [6, 66])
def test_ties_and_repeated_entries_get_the_lower_code(size):
    codebook = jnp.sort(jnp.concatenate([jnp.array([-1.0, 1.0, 1.0]), jnp.full(size - 3, 3.0)]))
    codes = nearest_codes(jnp.array([[0.0, 1.0, 2.0], [3.0, -jnp.inf, jnp.nan]]), codebook)
    np.testing.assert_array_equal(codes, [[0, 1, 2], [3, 0, 0]])
    assert nearest_codes(jnp.array([jnp.inf]), codebook) == size - 1


def test_lloyd_steps_are_lloyds():
    values = draw("laplace", SHORT)
    start = linear_codebook(jnp.asarray(values), 9)
    for steps in (0, 1, 5):
        ours = lloyd(jnp.asarray(values), start, steps)
        np.testing.assert_allclose(ours, lloyd_steps(values, start, steps), rtol=2e-5, atol=2e-6)


def test_an_entry_that_no_value_is_near_stays():
    assert lloyd(jnp.array([1.0, 2.0]), jnp.array([1.0, 50.0]), 3).tolist() == [1.5, 50.0]


def test_the_starts_are_those_of_deep_compression():
    values = draw("normal", SHORT)
    low, high = values.min(), values.max()
    array = jnp.asarray(values)
    np.testing.assert_allclose(
        linear_codebook(array, 7), np.linspace(low, high, 7), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(linear_codebook(array, 1), [(low + high) / 2], rtol=1e-5)
    quantiles = np.quantile(values, (np.arange(7) + 0.5) / 7, method="inverted_cdf")
    np.testing.assert_allclose(density_codebook(array, 7), quantiles, rtol=1e-6)
    long = draw("normal", LONG)
    quantiles = np.quantile(long, (np.arange(16) + 0.5) / 16)
    np.testing.assert_allclose(density_codebook(jnp.asarray(long), 16), quantiles, atol=1e-3)
    random = np.asarray(random_codebook(jax.random.key(0), array, 7))
    assert np.isin(random, values).all() and np.unique(random).size == 7
    other = random_codebook(jax.random.key(1), array, 7)
    assert (np.diff(random) > 0).all() and (other != random).any()
    short = random_codebook(jax.random.key(1), array[:2], 7)
    assert np.isin(short, values[:2]).all()


def test_tied_gradients_are_the_gradient_of_the_shared_entry():
    codes = jnp.array([[0, 2, 2], [1, 0, 2]], jnp.uint8)
    target = jnp.arange(6.0).reshape(2, 3)

    def loss(codebook):
        return jnp.sum((codebook[codes.astype(jnp.int32)] - target) ** 2)

    codebook = jnp.array([0.5, -1.0, 2.0, 7.0])
    each = 2 * (codebook[codes.astype(jnp.int32)] - target)
    tied = tied_gradient(each, codes, 4)
    np.testing.assert_allclose(tied, jax.grad(loss)(codebook))
    assert tied[3] == 0


@pytest.mark.parametrize(
    ("size", "function"), [(SHORT, optimal_codebook_with_zero), (LONG, optimal_codebook)]
)
def test_vmap_gives_what_each_row_gives(size, function):
    rows = jnp.stack([jnp.asarray(draw(name, size)) for name in ("normal", "sparse", "student")])
    together = jax.jit(jax.vmap(lambda row: function(row, 16)))(rows)
    for row, codebook in zip(rows, together, strict=True):
        np.testing.assert_allclose(codebook, function(row, 16), rtol=1e-4, atol=1e-6)
    codebooks = jnp.sort(rows[:, :40], 1)
    codes = jax.vmap(nearest_codes)(rows, codebooks)
    for row, book, code in zip(rows, codebooks, codes, strict=True):
        np.testing.assert_array_equal(book[code], book[nearest(row, book)])


def test_narrow_floats_are_fitted_in_float32():
    values = jnp.asarray(draw("normal", SHORT), jnp.bfloat16)
    codebook = optimal_codebook(values, 16)
    assert codebook.dtype == jnp.float32 and not codebook.weak_type
    assert gap(values.astype(jnp.float32), 16, codebook) < 1e-4
    codes = nearest_codes(values, codebook.astype(jnp.bfloat16))
    assert codes.shape == values.shape


def test_no_gradient_flows():
    values = jnp.asarray(draw("normal", 40))
    slope = jax.grad(lambda v: jnp.sum(optimal_codebook(v, 16) ** 2))(values)
    np.testing.assert_array_equal(slope, np.zeros(40))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: optimal_codebook(x, 0), "count must be at least 1, got 0"),
        (lambda x: optimal_codebook(x[:0], 2), "values must number 1 to"),
        (lambda x: optimal_codebook(x, 2, x[:2]), r"weights of shape \(2,\) do not match"),
        (lambda x: optimal_codebook_with_zero(x, 1), "count must be at least 2"),
        (lambda x: lloyd(x, x, -1), "steps must be at least 0, got -1"),
        (lambda x: nearest_codes(x, x[:0]), "codebook must be a vector of entries"),
        (lambda x: nearest_codes(x, x[None]), "codebook must be a vector of entries"),
        (lambda x: tied_gradient(x, jnp.zeros(2, jnp.int32), 2), "do not match gradient"),
        (lambda x: tied_gradient(x, jnp.zeros(3, jnp.int32), 0), "count must be at least 1"),
    ],
)
def test_wrong_sizes_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, f: optimal_codebook(i, 2), "values must be floating-point, got int32"),
        (lambda i, f: optimal_codebook(f, 2, i), "weights must be floating-point, got int32"),
        (lambda i, f: nearest_codes(f, i), "codebook must be floating-point, got int32"),
        (lambda i, f: nearest_codes(i, f), "values must be floating-point, got int32"),
        (lambda i, f: tied_gradient(i, i, 2), "gradient must be floating-point, got int32"),
        (lambda i, f: tied_gradient(f, f, 2), "codes must be integers, got float32"),
    ],
)
def test_wrong_dtypes_say_what_is_wrong(call, message):
    with pytest.raises(TypeError, match=message):
        call(jnp.arange(3), jnp.ones(3))
