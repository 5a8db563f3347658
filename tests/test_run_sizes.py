"""Products of any size and scale, by native kernels, agree with the plain path in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jopt
from jopt import quant, run
from tests.conftest import needs_compiler

ANY = {  # with scales by output and by group, zero points, and tables
    "int8": quant.QuantSpec(8),
    "affine8": quant.QuantSpec(8, (1,), quant.minmax, quant.affine),
    "int4": quant.QuantSpec(4),
    "affine4": quant.QuantSpec(4, (1,), quant.minmax, quant.affine),
    "int4 by 32": quant.QuantSpec(4, (32, 1)),
    "int4 by 64": quant.QuantSpec(4, (64, 1)),
    "nf4": quant.QuantSpec(4, (1,), quant.absmax, quant.nf4),
    "binary": quant.QuantSpec(1, (1,), quant.absmax, quant.binary),
}


def shift_of(leaf):
    """Return what zero points take away from sums, of each weight: it is rounded as well."""
    if getattr(leaf, "zero_point", None) is None:
        return 0.0
    zero = np.asarray(leaf.zero_point, np.float64)
    return 2 * np.asarray(leaf.scale, np.float64) * np.maximum(np.abs(zero), 255)


@needs_compiler
@given(
    name=st.sampled_from(sorted(ANY)),
    rows=st.integers(0, 21),
    inputs=st.one_of(st.integers(1, 150), st.integers(250, 600)),
    outputs=st.integers(1, 50),
    exponents=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
    rounded=st.booleans(),
    turned=st.booleans(),
    kept=st.sampled_from([1.0, 1.0, 0.1, 0.0]),  # of the weights: few lie in compressed rows
)
@example("int8", 1, 1, 1, (0, 0), True, False, 1.0)
@example("int8", 3, 513, 9, (0, 0), True, False, 0.1)
@example("int4 by 32", 1, 33, 1, (0, 0), False, False, 0.0)
@example("int4 by 64", 17, 128, 33, (12, -12), True, True, 1.0)
@settings(max_examples=80)
def test_products_of_any_size_agree_with_the_plain_path(
    native, name, rows, inputs, outputs, exponents, rounded, turned, kept
):
    spec = ANY[name]
    group = spec.block[0] if len(spec.block) > 1 else 1
    inputs = -(-inputs // group) * group
    draw = np.random.default_rng([rows, inputs, outputs])
    x = jnp.asarray(draw.normal(size=(rows, inputs)) * 10.0 ** exponents[0], jnp.float32)
    kernel = jnp.asarray(draw.normal(size=(inputs, outputs)) * 10.0 ** exponents[1], jnp.float32)
    leaf = quant.quantize(jnp.where(draw.random(kernel.shape) < kept, kernel, 0), spec)

    def product(params, x):  # whose inputs lie by row, or by column
        x = jax.lax.optimization_barrier(x.T).T if turned else x
        return x @ params["w"]

    ready = run.prepare(product, {"w": leaf}, x)
    how = "int8" if rounded else "float"
    found = np.asarray(run.compressed(product, activations=how)(ready, x), np.float64)
    weights, exact = (np.asarray(each, np.float64) for each in (jopt.materialize(leaf), x))
    allowed = 2e-6 * np.abs(exact) @ (np.abs(weights) + shift_of(leaf))
    if rounded:  # half a step of each row, and of each table
        step = np.abs(exact).max(1, initial=0, keepdims=True) / 127
        allowed = allowed + 0.5001 * step * np.abs(weights).sum(0)
        if name == "nf4":
            table = 0.5001 * np.abs(weights).max(0) / 127
            allowed = allowed + table * (np.abs(exact) + step).sum(1, keepdims=True)
    assert found.shape == (rows, outputs)
    assert (np.abs(found - exact @ weights) <= allowed).all()
