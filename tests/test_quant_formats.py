import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jopt
from jopt import CodebookTensor, codec, quant
from jopt.quant import QuantSpec
from jopt.quant._centroids import codebooks, with_codebooks
from jopt.quant._codebook import codebook, kmeans, nf4, normal_float, normal_float_values
from jopt.quant._floats import (
    e4m3,
    e5m2,
    mxfp4,
    mxfp6_e2m3,
    mxfp6_e3m2,
    mxfp8_e4m3,
    mxfp8_e5m2,
    nvfp4,
)
from jopt.quant._logarithmic import (
    additive_power_levels,
    additive_powers_of_two,
    arithmetic_mean,
    log_domain,
    logarithmic,
)
from tests import oracles_formats as oracles

USER_TABLE = (1.0, -1.0, -0.3, 0.0, 0.2)

CODEBOOKS = {
    "log_1": QuantSpec(1, (1,), grid=logarithmic()),
    "log_4": QuantSpec(4, (1,), grid=logarithmic()),
    "log_7": QuantSpec(7, (1,), grid=logarithmic(1.2)),
    "log_nearest": QuantSpec(4, (1,), grid=logarithmic(2.0, arithmetic_mean)),
    "additive_1": QuantSpec(1, (1,), grid=additive_powers_of_two),
    "additive_5": QuantSpec(5, (1,), grid=additive_powers_of_two),
    "additive_8": QuantSpec(8, (1,), grid=additive_powers_of_two),
    "user_table": QuantSpec(3, (1,), grid=codebook(USER_TABLE)),
    "nf4": QuantSpec(4, (1,), grid=nf4),
    "kmeans": QuantSpec(3, (1,), grid=kmeans),
}
FLOATS = {
    "e4m3": QuantSpec(8, (1,), grid=e4m3),
    "e5m2": QuantSpec(8, (1,), grid=e5m2),
    "mxfp4": QuantSpec(4, (32, 1), grid=mxfp4),
    "mxfp6_e2m3": QuantSpec(6, (32, 1), grid=mxfp6_e2m3),
    "mxfp6_e3m2": QuantSpec(6, (32, 1), grid=mxfp6_e3m2),
    "mxfp8_e4m3": QuantSpec(8, (32, 1), grid=mxfp8_e4m3),
    "mxfp8_e5m2": QuantSpec(8, (32, 1), grid=mxfp8_e5m2),
    "nvfp4": QuantSpec(4, (16, 1), grid=nvfp4),
}
MX = {name: name.split("_")[-1] for name in FLOATS if name.startswith("mx")} | {"mxfp4": "e2m1"}
ELEMENT = {**MX, "e4m3": "e4m3", "e5m2": "e5m2", "nvfp4": "e2m1"}
SPECS = {**CODEBOOKS, **FLOATS}
EVERY = pytest.mark.parametrize("name", SPECS)
NEAREST = pytest.mark.parametrize(
    "name", [name for name in SPECS if name not in ("log_1", "log_4", "log_7", "additive_1")]
)


@pytest.fixture(scope="module")
def weights():
    values = np.random.default_rng(0).standard_t(4, size=(64, 6)).astype(np.float32)
    values[::5, 1] = 0.0
    values[:, 4] *= 1e-2
    return jnp.asarray(values)


@pytest.fixture(scope="module")
def quantized(weights):
    """Return one leaf for each format, so that each is compiled once."""
    return {name: quant.quantize(weights, spec) for name, spec in SPECS.items()}


def levels_of(name, leaf):
    """Return all levels that each element may take, as float64, along one more axis."""
    if name in CODEBOOKS:
        scale = 1.0 if leaf.scale is None else np.asarray(leaf.scale, np.float64)[..., None]
        levels = np.asarray(leaf.codebook, np.float64) * scale
        return np.broadcast_to(levels, (*leaf.shape, levels.shape[-1]))
    scale = np.asarray(leaf.scale, np.float64)
    scale = np.repeat(scale, leaf.shape[0] // scale.shape[0], 0)
    if leaf.global_scale is not None:
        scale = scale * np.asarray(leaf.global_scale, np.float64)
    return scale[..., None] * oracles.numbers_of(oracles.ELEMENTS[ELEMENT[name]][0])


# --- what holds for every format ------------------------------------------------------------------


@NEAREST
def test_every_value_takes_the_nearest_level(name, weights, quantized):
    values = np.asarray(weights, np.float64)
    least = np.abs(values[..., None] - levels_of(name, quantized[name])).min(-1)
    error = np.abs(np.asarray(jopt.materialize(quantized[name]), np.float64) - values)
    np.testing.assert_allclose(error, least, rtol=1e-5, atol=2e-7 * np.abs(values).max())


@EVERY
def test_zeros_stay_exactly_zero(name, weights, quantized):
    restored = np.asarray(jopt.materialize(quantized[name]))
    assert (restored[np.asarray(weights) == 0] == 0).all()


@EVERY
def test_quantizing_twice_changes_nothing(name, quantized):
    once = jopt.materialize(quantized[name])
    twice = jopt.materialize(quant.quantize(once, SPECS[name]))
    np.testing.assert_allclose(twice, once, rtol=2e-6)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "nvfp4"])
def test_blocks_do_not_depend_on_each_other(name, weights, quantized):
    changed = weights.at[:, 0].multiply(100.0)  # NVFP4 shares the scale of the tensor
    together = jopt.materialize(quant.quantize(changed, SPECS[name]))
    chex.assert_trees_all_equal(together[:, 1:], jopt.materialize(quantized[name])[:, 1:])


@EVERY
def test_fake_quantize_is_exactly_quantize_then_materialize(name, weights, quantized):
    rounded, pull_back = jax.vjp(lambda values: quant.fake_quantize(values, SPECS[name]), weights)
    chex.assert_trees_all_equal(rounded, jopt.materialize(quantized[name]))
    (gradient,) = pull_back(jnp.ones_like(weights))
    chex.assert_trees_all_equal(gradient, jnp.ones_like(weights))


def one_block(weights, leaf, spec):
    """Return the values and the leaf of the first row of blocks."""
    rows = spec.block[0] if len(spec.block) == 2 else weights.shape[0]
    return weights[:rows], jax.tree.map(lambda f: f[:rows] if f is leaf.codes else f[:1], leaf)


@EVERY
def test_the_neighbours_are_the_levels_around_each_value(name, weights, quantized):
    spec = SPECS[name]
    values, leaf = one_block(weights, quantized[name], spec)
    possible = levels_of(name, leaf)
    on_levels = jopt.materialize(leaf)
    values = jnp.stack([values, 5 * values, on_levels])  # some lie outside the range
    levels = jax.tree.map(lambda field: field[None], leaf.replace(codes=None))
    find = jax.jit(
        lambda v: jax.tree.map(
            jopt.materialize,
            spec.grid.neighbours(v, levels, spec.bits),
            is_leaf=jopt.is_compressed,
        )
    )
    below, above = map(np.asarray, find(values))
    if spec.bits == 1:  # the zero in the middle is for exact zeros only
        possible = possible[..., ::2]
    assert (below <= above).all()
    inside = np.clip(np.asarray(values), possible.min(-1), possible.max(-1))
    slack = 1e-6 * np.abs(inside)  # a level is known to the rounding of float32
    assert (below <= inside + slack).all() and (inside - slack <= above).all()
    low, high = below + 1e-6 * np.abs(below), above - 1e-6 * np.abs(above)
    between = (low[..., None] < possible) & (possible < high[..., None])
    assert not between.any()
    np.testing.assert_array_equal(below[2], on_levels)
    np.testing.assert_array_equal(above[2], on_levels)


@pytest.mark.parametrize(  # each draw is a program of its own: one format of each kind
    "name", ["log_1", "log_4", "additive_8", "nf4", "e4m3", "mxfp6_e3m2", "nvfp4"]
)
def test_stochastic_rounding_is_unbiased(name, weights):
    spec = SPECS[name]
    values, draws = np.asarray(weights[:32]), 200
    copies = np.tile(values, (draws, 1))  # the same largest values, so the same levels
    leaf = quant.quantize_stochastically(jax.random.key(0), copies, spec)
    rounded = np.asarray(jopt.materialize(leaf)).reshape(draws, *values.shape)
    low, high = rounded.min(0), rounded.max(0)
    # Values beyond the last level take it: the largest of an MX block, the outer k-means ones.
    inside = (low < values) & (values < high)
    assert inside.mean() > 0.5
    deviation = np.sqrt(np.maximum((values - low) * (high - values), 0) / draws)
    bias = np.abs(rounded.mean(0) - values)
    assert (bias <= 5 * deviation + 1e-6 * np.abs(values).max())[inside].all()
    assert (rounded[:, values == 0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-42, 1e-30, 1e30])
def test_a_constant_block_is_restored(value):
    values = np.full((64, 6), value, np.float32)
    for name, spec in SPECS.items():
        restored = np.asarray(quant.fake_quantize(values, spec))
        tolerance = 1 / 4 if name in MX else 1e-6  # a power of two need not meet the largest value
        np.testing.assert_allclose(restored, values, rtol=tolerance, atol=1e-37, err_msg=name)
    leaf = quant.quantize(np.zeros((64, 6), np.float32), FLOATS["mxfp4"])
    assert float(leaf.scale.astype(jnp.float32).max()) == 1.0
    assert float(quant.quantize(np.zeros((64, 6), np.float32), CODEBOOKS["nf4"]).scale.max()) == 1.0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.bfloat16) for name in ("log_4", "nf4", "kmeans", "e4m3", "mxfp4", "nvfp4")]
    + [("nf4", jnp.float16), ("nvfp4", jnp.float16)],
)
def test_narrow_values_keep_their_dtype_and_are_restored_as_well(name, dtype, weights, quantized):
    values = weights.astype(dtype)
    wide = np.asarray(values, np.float64)
    leaf = quant.quantize(values, SPECS[name])
    restored = jopt.materialize(leaf)
    assert restored.dtype == dtype == leaf.dtype
    error = np.abs(np.asarray(restored, np.float64) - wide)
    expected = np.abs(np.asarray(jopt.materialize(quantized[name]), np.float64) - wide)
    rounding = 4 * float(jnp.finfo(dtype).eps) * np.abs(wide).max(0)
    assert (error <= expected + rounding).all()
    assert (np.asarray(restored)[wide == 0] == 0).all()


# --- codebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2.0, 1.5])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_logarithmic_rounds_the_exponent(bits, base, weights):
    values = np.asarray(weights)[:, :4].ravel()
    restored = quant.fake_quantize(values, QuantSpec(bits, (), grid=logarithmic(base)))
    np.testing.assert_allclose(restored, oracles.log_quantized(values, bits, base), rtol=1e-6)


def test_logarithmic_rounding_to_the_nearest_level_has_the_smaller_error(weights):
    def error(rounding):
        spec = QuantSpec(4, (1,), grid=logarithmic(2.0, rounding))
        return float(((quant.fake_quantize(weights, spec) - weights) ** 2).sum())

    assert error(arithmetic_mean) < error(log_domain)


def test_logarithmic_levels_are_normal_numbers_for_any_bits_and_base():
    values = np.asarray([1.0, 0.0, 2.0**-110, -(2.0**-125), 2.0**-126], np.float32)
    for base in (1.01, 2.0, 2.0**32):
        leaf = quant.quantize(values, QuantSpec(8, (), grid=logarithmic(base)))
        table = np.asarray(leaf.codebook)[0]
        assert len(table) % 2 == 1 and (np.diff(table) > 0).all()
        assert float(jopt.materialize(leaf)[1]) == 0.0
    assert quant.quantize(values, QuantSpec(8, (), grid=logarithmic())).codebook.shape == (1, 253)
    assert quant.quantize(values, QuantSpec(7, (), grid=logarithmic())).codebook.shape == (1, 127)


@pytest.mark.parametrize("bits", oracles.ADDITIVE_TERMS)
def test_additive_powers_are_the_published_sums(bits):
    expected = oracles.additive_powers(oracles.ADDITIVE_TERMS[bits])
    assert len(expected) == 2**bits
    np.testing.assert_allclose(additive_power_levels(bits + 1), expected, rtol=1e-12)


def test_additive_powers_of_eight_bits_use_every_code():
    levels = additive_power_levels(8)
    assert len(levels) == 128 and levels[0] == 0.0 and levels[-1] == 1.0


def test_nf4_is_the_published_table():
    np.testing.assert_allclose(normal_float_values(4), oracles.NF4, atol=2e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_have_all_codes_an_exact_zero_and_both_ends(bits):
    levels = normal_float_values(bits)
    assert len(levels) == 2**bits and list(levels) == sorted(levels)
    assert levels[0] == -1.0 and levels[-1] == 1.0 and levels[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize("block", [(), (64, 1), (-1, 1)])
def test_every_normal_float_level_is_found_among_many(block):
    """A table of 256 entries is searched, one of 16 is compared: both must find the nearest."""
    values = np.random.default_rng(3).normal(size=(128, 3)).astype(np.float32)
    for bits in (4, 8):
        restored = quant.fake_quantize(values, QuantSpec(bits, block, grid=normal_float(bits)))
        rows = block[0] if block == (64, 1) else 128
        for start in range(0, 128, rows):
            for column in range(3) if block else [slice(0, 3)]:
                part = values[start : start + rows, column].astype(np.float64)
                levels = np.abs(part).max() * np.asarray(normal_float_values(bits))
                got = np.asarray(restored)[start : start + rows, column]
                np.testing.assert_allclose(got, oracles.nearest(part, levels), rtol=1e-5)


def test_a_table_of_the_users_is_scaled_by_its_largest_entry():
    grid = codebook((8, -2, 0))  # any order, whole numbers
    leaf = quant.quantize(jnp.array([-4.0, -1.0, 0.4, 3.0]), QuantSpec(2, (), grid=grid))
    np.testing.assert_array_equal(leaf.codebook, [[-2, 0, 8]])
    np.testing.assert_array_equal(leaf.scale, [0.5])
    np.testing.assert_array_equal(leaf.codes.astype(jnp.int32), [0, 0, 1, 2])
    assert grid is codebook((-2.0, 0.0, 8.0))


def test_a_value_between_two_entries_takes_the_lower_one():
    spec = QuantSpec(2, (), grid=codebook((-2.0, 0.0, 2.0)))
    restored = quant.fake_quantize(jnp.array([-2.0, -1.0, 1.0, 2.0]), spec)
    np.testing.assert_array_equal(restored, [-2.0, -2.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "values must be a tuple of numbers"),
        ((0.0, "1"), TypeError, "values must be a tuple of numbers"),
        ((1.0,), ValueError, "values must be 2 to 256 numbers, not 1"),
        (tuple(range(257)), ValueError, "values must be 2 to 256 numbers, not 257"),
        ((0.0, float("nan")), ValueError, "values must be finite"),
        ((1.0, 1.0 + 1e-9), ValueError, "values must differ"),
    ],
)
def test_tables_that_make_no_sense_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        codebook(values)


def test_bits_that_cannot_name_the_levels_are_refused():
    values = jnp.ones((32, 1))
    with pytest.raises(ValueError, match="grid nf4 has 16 levels; bits=3 names only 8"):
        quant.quantize(values, QuantSpec(3, grid=nf4))
    with pytest.raises(ValueError, match="grid codebook has 5 levels; bits=2 names only 4"):
        quant.quantize(values, QuantSpec(2, grid=codebook(USER_TABLE)))
    with pytest.raises(ValueError, match="grid mxfp4 has codes of 4 bits; bits must be 4, not 8"):
        quant.quantize(values, QuantSpec(8, grid=mxfp4))
    with pytest.raises(ValueError, match="grid mxfp6_e2m3 has codes of 6 bits; bits must be 6"):
        quant.quantize(values, QuantSpec(4, grid=mxfp6_e2m3))


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_normal_floats_of_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits of a normal float must be 2 to 8"):
        normal_float(bits)


@pytest.mark.parametrize("base", [1.0, 0.5, -2.0, float("nan"), 2.0**33, True, "2"])
def test_bases_out_of_range_are_refused(base):
    with pytest.raises(ValueError, match="base must be above 1"):
        logarithmic(base)


def test_a_rounding_must_be_a_function():
    with pytest.raises(TypeError, match="rounding must be a function"):
        logarithmic(2.0, "nearest")  # pyright: ignore[reportArgumentType]


def test_factories_return_the_identical_grid_for_equal_arguments():
    assert normal_float(4) is nf4 and normal_float(3) is normal_float(3)
    assert logarithmic(2.0, log_domain) is logarithmic(2.0, log_domain)


# --- k-means --------------------------------------------------------------------------------------


def test_kmeans_fits_each_block_and_beats_any_other_table(weights, quantized):
    leaf = quantized["kmeans"]
    assert leaf.codebook.shape == (1, 6, 8) and leaf.scale is None
    error = ((jopt.materialize(leaf) - weights) ** 2).sum(0)
    others = QuantSpec(3, (1,), grid=normal_float(3))
    assert (error <= ((quant.fake_quantize(weights, others) - weights) ** 2).sum(0)).all()


def test_kmeans_restores_a_block_of_few_different_values():
    values = np.tile(np.asarray([[-1.0, 5.0], [2.0, 5.0], [0.0, 5.0], [9.0, 5.0]]), (16, 3))
    values, spec = values.astype(np.float32), SPECS["kmeans"]
    np.testing.assert_allclose(quant.fake_quantize(values, spec), values, rtol=1e-6)
    assert (np.asarray(quant.fake_quantize(values, spec))[values == 0] == 0).all()
    levels = quant.fit_levels(jnp.asarray(values), spec)
    between = jnp.full((64, 6), 1.5)
    below, above = kmeans.neighbours(between, levels, 3)
    np.testing.assert_allclose(jopt.materialize(below)[0, :2], [0.0, 5.0])
    np.testing.assert_allclose(jopt.materialize(above)[0, :2], [2.0, 5.0])


def test_kmeans_keeps_a_table_for_each_block_of_rows():
    values = jnp.concatenate([jnp.linspace(0.0, 1.0, 8), jnp.linspace(10.0, 90.0, 8)])[:, None]
    leaf = quant.quantize(values, QuantSpec(1, (8, 1), grid=kmeans))
    assert leaf.codebook.shape == (2, 1, 2)
    assert float(leaf.codebook[0].max()) <= 1.0 < 10.0 <= float(leaf.codebook[1].min())


# --- fine-tuning of centroids ---------------------------------------------------------------------


def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights(weights, quantized):
    leaf = quantized["kmeans"]
    factor = np.random.default_rng(5).normal(size=weights.shape).astype(np.float32)
    gradient = jax.grad(
        lambda table: (factor * jopt.materialize(with_codebooks(leaf, table))).sum()
    )(codebooks(leaf))
    codes = np.asarray(leaf.codes.astype(jnp.int32))
    for column in range(6):
        for entry in range(8):
            expected = factor[:, column][codes[:, column] == entry].sum(dtype=np.float64)
            if float(leaf.codebook[0, column, entry]) == 0.0:
                expected = 0.0
            assert float(gradient[0, column, entry]) == pytest.approx(expected, abs=1e-4)


def test_training_centroids_lowers_the_loss_and_keeps_zeros(weights):
    pruned = jnp.where(jnp.abs(weights) > 0.6, weights, 0.0)
    small = {"w": quant.quantize(pruned, SPECS["kmeans"]), "b": jnp.ones((1, 6))}
    random = np.random.default_rng(6)  # inputs that depend on each other, as in a network
    inputs = (random.normal(size=(200, 8)) @ random.normal(size=(8, 64)) / 8).astype(np.float32)
    target = inputs @ weights + 1.0

    def loss(trained):
        restored = jopt.materialize(with_codebooks(small, trained))
        return ((inputs @ restored["w"] + restored["b"] - target) ** 2).mean()

    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    trained = codebooks(small)
    state = optimizer.init(trained)

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    values = []
    for _ in range(30):
        trained, state, value = step(trained, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    tuned = with_codebooks(small, trained)
    chex.assert_trees_all_equal_structs(tuned, small)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuned, small)
    old, new = jopt.materialize(small["w"]), jopt.materialize(tuned["w"])
    np.testing.assert_array_equal(np.asarray(old) == 0, np.asarray(new) == 0)


def test_codebooks_that_do_not_fit_are_refused():
    leaf = CodebookTensor(jnp.array([1, 0], jnp.uint2), jnp.array([[0.0, 2.0]]))
    with pytest.raises(ValueError, match="no CodebookTensor"):
        codebooks({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="trained must have the structure"):
        with_codebooks({"w": leaf}, [jnp.ones((1, 2))])
    with pytest.raises(
        ValueError, match=r"trained codebook of shape \(1, 3\) where one is \(1, 2\)"
    ):
        with_codebooks(leaf, jnp.ones((1, 3)))


# --- narrow floats --------------------------------------------------------------------------------


def awkward_ratios(element):
    """Return all numbers of a narrow float, the ties between them and what lies beside the ties."""
    numbers = oracles.numbers_of(oracles.ELEMENTS[element][0]).astype(np.float32)
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([numbers, ties, *beside])


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_is_ml_dtypes_rounding_at_every_number_and_tie(name):
    ratios = awkward_ratios(name)
    leaf = quant.quantize(ratios, QuantSpec(8, (), grid=SPECS[name].grid))
    np.testing.assert_array_equal(leaf.scale, [1.0])
    assert leaf.codes.dtype == oracles.ELEMENTS[name][0]
    np.testing.assert_array_equal(np.asarray(leaf.codes, np.float64), oracles.element(ratios, name))


@pytest.mark.parametrize("name", MX)
def test_mx_formats_are_those_of_the_standard(name):
    element = ELEMENT[name]
    ratios = np.concatenate([awkward_ratios(element), np.zeros(31, np.float32)])
    ratios = ratios[: len(ratios) // 32 * 32].reshape(-1, 32)
    ratios[:, 0] = oracles.ELEMENTS[element][2]  # so that the ratios are kept
    noise = np.random.default_rng(1).normal(size=(40, 32)).astype(np.float32)
    values = np.concatenate([ratios, noise * 2.0 ** np.arange(-20, 20, dtype=np.float32)[:, None]])
    values[len(ratios)] = 0.0
    leaf = quant.quantize(values, QuantSpec(SPECS[name].bits, (1, 32), grid=SPECS[name].grid))
    scale, restored = oracles.mx(values, element, 32)
    assert leaf.scale.dtype == ml_dtypes.float8_e8m0fnu and leaf.scale.shape == scale.shape
    np.testing.assert_array_equal(np.asarray(leaf.scale, np.float64), scale)
    np.testing.assert_array_equal(jopt.materialize(leaf), restored)
    np.testing.assert_array_equal(leaf.global_scale, [[1.0]])


def test_nvfp4_is_two_levels_of_scales(weights):
    values = np.asarray(weights).reshape(-1, 32)
    values = np.concatenate([values, np.zeros((1, 32), np.float32)])
    leaf = quant.quantize(values, QuantSpec(4, (1, 16), grid=nvfp4))
    scale, whole, restored = oracles.nvfp4(values[:-1], 16)
    assert leaf.codes.dtype == ml_dtypes.float4_e2m1fn
    assert leaf.scale.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_allclose(float(leaf.global_scale[0, 0]), whole, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(leaf.scale, np.float64)[:-1].reshape(-1, 1), scale)
    np.testing.assert_allclose(jopt.materialize(leaf)[:-1], restored, rtol=1e-6)
    assert (np.asarray(jopt.materialize(leaf))[-1] == 0).all()


def test_nvfp4_keeps_what_it_can_of_a_block_that_is_small_beside_the_tensor():
    values = np.ones((2, 16), np.float32)
    values[1] = 1e-7
    leaf = quant.quantize(values, QuantSpec(4, (1, 16), grid=nvfp4))
    assert float(leaf.scale.astype(jnp.float32).min()) == 2.0**-9
    assert np.isfinite(np.asarray(jopt.materialize(leaf))).all()


@pytest.mark.parametrize("name", FLOATS)
def test_values_beyond_the_range_take_its_end(name):
    def half(values, axes, restore):
        low, high = quant.absmax(values, axes)
        return 0.5 * low, 0.5 * high

    values = np.asarray([[8.0] + 30 * [1.0] + [-8.0]], np.float32)
    spec = QuantSpec(SPECS[name].bits, (1, 32), half, SPECS[name].grid)
    restored = np.asarray(quant.fake_quantize(values, spec))
    assert np.isfinite(restored).all() and 4.0 <= restored[0, 0] < 8.0
    assert restored[0, -1] == -restored[0, 0]


# --- files ----------------------------------------------------------------------------------------


@EVERY
def test_what_was_saved_comes_back_bit_for_bit(name, quantized, tmp_path):
    tree = {"w": quantized[name]}
    codec.save(tmp_path / "w.jopt", tree)
    loaded = codec.load(tmp_path / "w.jopt", like=tree)
    chex.assert_trees_all_equal_structs(loaded, tree)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True):
        assert old.dtype == new.dtype and np.asarray(old).tobytes() == np.asarray(new).tobytes()
