"""Layers of any model are found, their inputs recorded in the kernel's order, or changed."""

import functools
from typing import Any

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jopt._arrays import QTensor
from jopt.layers import find_layers, from_matrix, layer_inputs, map_inputs, to_matrix
from tests import oracles_layers as oracles

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(shapes) -> Any:
    """Fill a tree of shapes with numbers; quicker than to compile the initializers."""
    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        treedef, [normal(10 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    )


def linen_case(module, x) -> Any:
    """Return `(apply, params, x)` of a linen module."""
    params = filled(jax.eval_shape(module.init, KEY, x)["params"])
    return (lambda params, x: module.apply({"params": params}, x)), params, x


def nnx_case(make, x) -> Any:
    """Return `(apply, params, x)` of the nnx module that `make` makes."""
    graph, shapes, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def apply(params, x):
        module: Any = nnx.merge(graph, params, rest)
        return module(x)

    return apply, filled(shapes), x


def run(apply, params, x):
    """Run a model and return its outputs as a NumPy array."""
    return np.asarray(jax.jit(apply)(params, x))


def check_layer(case, path, expected_rows, rows_first=None):
    """Check the recorded rows, and that rows times kernel are the output of a lone layer.

    `rows_first(outputs)` brings the outputs to (leading..., count, outputs).
    """
    apply, params, x = case
    rows = layer_inputs(apply)(params, x)[path]
    layer = find_layers(apply, params, x).layers[path][0]
    kernel: Any = {
        jax.tree_util.keystr(key, simple=True, separator="/").removesuffix("/value"): leaf
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }[path]
    kernel = np.asarray(kernel)
    matrix = to_matrix(layer, kernel)
    assert rows.shape == (*layer.leading, rows.shape[-2], layer.features)
    if expected_rows is not None:
        np.testing.assert_allclose(rows, expected_rows, rtol=1e-6, atol=1e-6)
    outputs = run(apply, params, x)
    outputs = outputs.reshape(-1, matrix.shape[-1]) if rows_first is None else rows_first(outputs)
    product = np.asarray(rows, np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(product, outputs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(from_matrix(layer, matrix), kernel)
    return layer


# --- dense layers -------------------------------------------------------------------------------


def test_a_linen_dense_kernel_gets_its_inputs_with_the_batch_axes_flattened():
    x = normal(1, 2, 3, 5)
    case = linen_case(linen.Dense(4, use_bias=False), x)
    layer = check_layer(case, "kernel", np.asarray(x).reshape(6, 5))
    assert (layer.kind, layer.contracted, layer.batch, layer.free) == ("dot", (0,), (), (1,))
    assert layer.input_axes == (2,)


def test_an_nnx_linear_kernel_gets_its_inputs():
    x = normal(1, 3, 5)
    check_layer(
        nnx_case(lambda: nnx.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0)), x), "kernel", x
    )


@pytest.mark.parametrize(("features_in", "features_out"), [(1, 4), (5, 1), (1, 1)])
def test_axes_of_one_element_keep_their_roles(features_in, features_out):
    x = normal(1, 3, features_in)
    case = linen_case(linen.Dense(features_out, use_bias=False), x)
    layer = check_layer(case, "kernel", x)
    assert (layer.contracted, layer.free) == ((0,), (1,))


def test_a_single_example_without_a_batch_axis_is_one_row():
    x = normal(1, 5)
    check_layer(linen_case(linen.Dense(4, use_bias=False), x), "kernel", x[None, :])


def test_an_empty_batch_gives_no_rows():
    apply, params, _ = linen_case(linen.Dense(4), normal(1, 2, 5))
    assert layer_inputs(apply)(params, jnp.zeros((0, 5)))["kernel"].shape == (0, 5)


def test_several_contracted_axes_are_flattened_in_the_order_of_the_kernel():
    x = normal(1, 2, 3, 4)
    case = linen_case(linen.DenseGeneral((2, 5), axis=(-2, -1), use_bias=False), x)
    layer = check_layer(case, "kernel", np.asarray(x).reshape(2, 12))
    assert (layer.contracted, layer.free) == ((0, 1), (2, 3))


def test_the_order_of_contraction_does_not_matter():
    x, params = normal(1, 2, 4, 3), {"w": normal(2, 3, 4, 5)}
    case = (lambda params, x: jnp.einsum("bqp,pqo->bo", x, params["w"]), params, x)
    check_layer(case, "w", np.asarray(x).transpose(0, 2, 1).reshape(2, 12))


def test_a_kernel_on_the_left_side_is_found():
    x, params = normal(1, 5, 3), {"w": normal(2, 4, 5)}
    case = (lambda params, x: params["w"] @ x, params, x)
    layer = check_layer(case, "w", np.asarray(x).T, lambda outputs: outputs.T)
    assert (layer.contracted, layer.input_axes) == ((1,), (0,))


def test_a_flipped_kernel_is_followed():
    x, params = normal(1, 3, 5), {"w": normal(2, 5, 4)}
    case = (lambda params, x: x @ params["w"][::-1], params, x)
    check_layer(case, "w", np.asarray(x)[:, ::-1])


def test_attention_projections_are_found_in_both_directions():
    apply, params, x = linen_case(linen.MultiHeadDotProductAttention(2), normal(1, 2, 4, 6))
    rows = layer_inputs(apply)(params, x)
    report = find_layers(apply, params, x)
    assert set(rows) == {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}
    np.testing.assert_array_equal(rows["query/kernel"], x.reshape(8, 6))
    out = report.layers["out/kernel"][0]
    assert (out.shape, out.contracted, out.free) == ((2, 3, 6), (0, 1), (2,))
    product = np.asarray(rows["out/kernel"]) @ to_matrix(out, params["out"]["kernel"])
    expected = run(apply, params, x) - params["out"]["bias"][None, None, :]
    np.testing.assert_allclose(product.reshape(2, 4, 6), expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_used_transposed_contracts_its_last_axis():
    class Tied(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            embed = linen.Embed(7, 3, name="embed")
            return embed.attend(embed(tokens))

    tokens = jnp.array([[1, 2], [6, 0]])
    case = linen_case(Tied(), tokens)
    table = case[1]["embed"]["embedding"]
    layer = check_layer(case, "embed/embedding", np.asarray(table)[np.ravel(tokens)])
    assert (layer.contracted, layer.free, layer.features) == ((1,), (0,), 3)


# --- convolutions -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["linen", "nnx"])
def test_a_convolution_records_patches_in_kernel_order(make):
    x = normal(1, 2, 6, 7, 3)
    if make == "linen":
        case = linen_case(linen.Conv(4, (3, 2), use_bias=False), x)
    else:
        case = nnx_case(lambda: nnx.Conv(3, 4, (3, 2), use_bias=False, rngs=nnx.Rngs(0)), x)
    expected = oracles.conv_patches(x, (3, 2), padding=((1, 1), (0, 1)))
    layer = check_layer(case, "kernel", expected)
    assert (layer.kind, layer.contracted, layer.input_axes) == ("conv", (0, 1, 2), (3,))


def test_a_strided_dilated_convolution_records_what_each_output_sees():
    x = normal(1, 2, 9, 8, 3)
    module = linen.Conv(
        4, (3, 2), (2, 3), padding=((2, 1), (0, 2)), kernel_dilation=(2, 3), use_bias=False
    )
    expected = oracles.conv_patches(x, (3, 2), (2, 3), (2, 3), ((2, 1), (0, 2)))
    layer = check_layer(linen_case(module, x), "kernel", expected)
    assert layer.window is not None
    assert (layer.window.size, layer.window.strides) == ((3, 2), (2, 3))


@pytest.mark.parametrize(("groups", "outputs"), [(2, 6), (4, 4), (4, 8)])
def test_each_group_of_a_convolution_gets_its_own_rows(groups, outputs):
    x = normal(1, 2, 5, 5, 4)
    module = linen.Conv(
        outputs, (3, 3), padding="VALID", feature_group_count=groups, use_bias=False
    )
    expected = oracles.grouped(oracles.conv_patches(x, (3, 3)), (9, (groups, 4 // groups)))

    def rows_first(y):
        return np.moveaxis(y.reshape(-1, groups, outputs // groups), 1, 0)

    layer = check_layer(linen_case(module, x), "kernel", expected, rows_first)
    assert (layer.groups, layer.grouped, layer.batch) == (groups, 3, ())


def test_a_transposed_convolution_is_a_convolution_of_a_dilated_input():
    x = normal(1, 2, 4, 3)
    module = linen.ConvTranspose(5, (3,), strides=(2,), use_bias=False)
    check_layer(linen_case(module, x), "kernel", None)


def test_layouts_other_than_nhwc_are_read_from_the_dimension_numbers():
    x, params = normal(1, 2, 3, 5, 6), {"w": normal(2, 4, 3, 2, 3)}

    def apply(params, x):
        numbers = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=numbers)

    expected = oracles.conv_patches(np.moveaxis(np.asarray(x), 1, -1), (2, 3))
    expected = expected.reshape(-1, 6, 3).transpose(0, 2, 1).reshape(-1, 18)  # (in, h, w)
    layer = check_layer((apply, params, x), "w", expected, lambda y: np.moveaxis(y, 1, 0)
                        .reshape(4, -1).T)  # fmt: skip
    assert (layer.contracted, layer.free) == ((1, 2, 3), (0,))


def test_a_convolution_written_as_patches_times_a_matrix_is_permuted_back():
    x, params = normal(1, 2, 5, 5, 3), {"w": normal(2, 2, 2, 3, 4)}

    def apply(params, x):
        patches = lax.conv_general_dilated_patches(
            x, (2, 2), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        flat = params["w"].transpose(3, 2, 0, 1).reshape(4, 12)  # patches come as (in, h, w)
        return flat @ patches.reshape(-1, 12).T

    expected = oracles.conv_patches(x, (2, 2))
    layer = check_layer((apply, params, x), "w", expected, lambda y: y.T)
    assert (layer.kind, layer.contracted, layer.free) == ("dot", (0, 1, 2), (3,))


# --- copies of layers: vmap and scan ------------------------------------------------------------


def vmapped(module, in_axes, **options):
    return linen.vmap(
        module, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, **options
    )


def test_vmapped_dense_layers_keep_their_copies_apart():
    x = normal(1, 3, 2, 4, 5)
    case = linen_case(vmapped(linen.Dense, 0)(6, use_bias=False), x)
    expected = np.asarray(x).reshape(3, 8, 5)
    layer = check_layer(case, "kernel", expected, lambda y: y.reshape(3, 8, 6))
    assert (layer.contracted, layer.batch, layer.scanned) == ((1,), (0,), ())


def test_one_copy_under_vmap_is_still_a_copy():
    x = normal(1, 1, 4, 5)
    case = linen_case(vmapped(linen.Dense, 0)(6, use_bias=False), x)
    check_layer(case, "kernel", x, lambda y: y)


def test_copies_that_share_their_input_share_their_rows():
    x = normal(1, 4, 5)
    case = linen_case(vmapped(linen.Dense, None, axis_size=3)(6, use_bias=False), x)
    layer = check_layer(case, "kernel", x, lambda y: np.moveaxis(y, 0, 1).reshape(4, 18))
    assert (layer.batch, layer.free) == ((), (0, 2))


def test_vmapped_grouped_convolutions_keep_copies_and_groups_apart():
    x = normal(1, 3, 2, 4, 4, 4)
    module = vmapped(linen.Conv, 0)(
        6, (2, 2), padding="VALID", feature_group_count=2, use_bias=False
    )
    expected = np.stack(
        [oracles.grouped(oracles.conv_patches(x[i], (2, 2)), (4, (2, 2))) for i in range(3)]
    )

    def rows_first(y):
        return np.moveaxis(y.reshape(3, 18, 2, 3), 2, 1)

    layer = check_layer(linen_case(module, x), "kernel", expected, rows_first)
    assert (layer.batch, layer.grouped, layer.leading) == ((0,), 4, (3, 2))


def test_vmapped_grouped_convolutions_of_one_input_are_found():
    x, params = normal(1, 2, 4, 4, 4), {"w": normal(2, 3, 2, 2, 2, 6)}

    def one(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    case = (lambda params, x: jax.vmap(one, (0, None))(params["w"], x), params, x)
    expected = oracles.grouped(oracles.conv_patches(x, (2, 2)), (4, (2, 2)))

    def rows_first(
        y,
    ):  # from (copies, images, h, w, groups * outputs)
        split = y.reshape(3, 18, 2, 3)
        return split.transpose(2, 1, 0, 3).reshape(2, 18, 9)

    layer = check_layer(case, "w", expected, rows_first)
    assert (layer.free, layer.grouped, layer.groups) == ((0, 4), 4, 2)


def test_heads_that_divide_an_output_axis_are_groups():
    x, params = normal(1, 2, 3, 5), {"w": normal(2, 5, 12)}

    def apply(params, x):
        return jnp.einsum("bhi,ihd->bhd", x, params["w"].reshape(5, 3, 4))

    case = (apply, params, x)
    layer = check_layer(case, "w", np.moveaxis(np.asarray(x), 1, 0), lambda y: np.moveaxis(y, 1, 0))
    assert (layer.groups, layer.grouped) == (3, 1)


class Block(linen.Module):
    @linen.compact
    def __call__(self, hidden, _):
        return jax.nn.relu(linen.Dense(4, name="dense")(hidden)), None


def stacked_inputs(params, x):
    """Run the stack of Blocks by hand and return each layer's input."""
    seen, hidden = [], np.asarray(x, np.float64)
    for kernel, bias in zip(params["dense"]["kernel"], params["dense"]["bias"], strict=True):
        seen.append(hidden.reshape(-1, 4))
        hidden = np.maximum(hidden @ np.asarray(kernel, np.float64) + np.asarray(bias), 0)
    return np.stack(seen)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wrap", [lambda block: block, linen.remat], ids=["plain", "remat"])
def test_scanned_layers_come_back_stacked(axis, wrap):
    scanned = linen.scan(
        wrap(Block), variable_axes={"params": axis}, split_rngs={"params": True}, length=3
    )
    x = normal(1, 2, 4)
    params = filled(jax.eval_shape(scanned().init, KEY, x, None)["params"])

    def apply(params, x):
        return scanned().apply({"params": params}, x, None)[0]

    rows = layer_inputs(apply)(params, x)["dense/kernel"]
    layer = find_layers(apply, params, x).layers["dense/kernel"][0]
    assert (layer.batch, layer.scanned) == ((axis,), (axis,))
    by_layer = jax.tree.map(lambda leaf: np.moveaxis(leaf, axis, 0), params)
    np.testing.assert_allclose(rows, stacked_inputs(by_layer, x), rtol=1e-5, atol=1e-6)
    assert to_matrix(layer, params["dense"]["kernel"]).shape == (3, 4, 4)


def test_scanned_nnx_layers_come_back_stacked_and_pass_through_a_second_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(keys):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(keys))

    class Twice(nnx.Module):
        def __init__(self):
            self.dense = make(jax.random.split(KEY, 3))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def stack(dense, x):
                return jax.nn.relu(dense(x))

            return stack(self.dense, stack(self.dense, x))

    apply, params, x = nnx_case(Twice, normal(1, 2, 4))
    rows = layer_inputs(apply)(params, x)["dense/kernel"]
    plain = {
        "dense": {
            name: np.asarray(params["dense"][name].get_value()) for name in ("kernel", "bias")
        }
    }
    first = stacked_inputs(plain, x)
    last = first[-1] @ np.asarray(plain["dense"]["kernel"][-1]) + plain["dense"]["bias"][-1]
    second = stacked_inputs(plain, np.maximum(last, 0))
    np.testing.assert_allclose(rows, np.concatenate([first, second], 1), rtol=1e-5, atol=1e-6)


def test_scans_within_scans_and_copies_keep_every_leading_axis_in_kernel_order():
    params, x = {"w": normal(1, 2, 5, 3, 4, 4)}, normal(2, 5, 6, 4)

    def inner(hidden, kernels):  # kernels (5, 4, 4), one for each of the copies
        return jnp.tanh(jnp.einsum("cni,cio->cno", hidden, kernels)), None

    def outer(hidden, kernels):
        return lax.scan(inner, hidden, kernels.swapaxes(0, 1))

    def apply(params, x):
        return lax.scan(outer, x, params["w"])[0]

    rows = layer_inputs(apply)(params, x)["w"]
    assert rows.shape == (2, 5, 3, 6, 4)
    hidden = np.asarray(x, np.float64)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(rows[i, :, j], hidden, rtol=1e-4, atol=1e-5)
            hidden = np.tanh(np.einsum("cni,cio->cno", hidden, params["w"][i, :, j]))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_reversed_stack_is_recorded_at_the_layer_that_saw_it(reverse):
    params, x = {"w": normal(1, 3, 4, 4)}, normal(2, 5, 4)

    def apply(params, x):
        kernels = params["w"] if reverse else params["w"][::-1]
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, kernels, reverse=reverse)[0]

    rows = layer_inputs(apply)(params, x)["w"]
    hidden = np.asarray(x, np.float64)
    for i in (2, 1, 0):
        np.testing.assert_allclose(rows[i], hidden, rtol=1e-4, atol=1e-5)
        hidden = np.tanh(hidden @ np.asarray(params["w"][i], np.float64))


def test_a_kernel_that_each_step_of_a_scan_uses_gets_the_rows_of_all_steps():
    apply, params, x = linen_case(linen.RNN(linen.SimpleCell(3)), normal(1, 2, 4, 5))
    rows = layer_inputs(apply)(params, x)
    steps_first = np.asarray(x).transpose(1, 0, 2).reshape(8, 5)
    np.testing.assert_array_equal(rows["cell/i/kernel"], steps_first)
    hidden = np.concatenate([np.zeros((1, 2, 3)), np.moveaxis(run(apply, params, x), 1, 0)[:-1]])
    np.testing.assert_allclose(rows["cell/h/kernel"], hidden.reshape(8, 3), atol=1e-6)


def test_a_kernel_carried_unchanged_through_a_scan_is_found_and_a_changed_one_is_not():
    params, x = {"w": normal(1, 4, 4), "moving": normal(2, 4, 4)}, normal(3, 2, 4)

    def step(carry, _):
        w, moving, hidden = carry
        return (w, 0.5 * moving, jnp.tanh(hidden @ w) @ moving), None

    def apply(params, x):
        (w, _, hidden), _ = lax.scan(step, (params["w"], params["moving"], x), length=3)
        return hidden @ w

    report = find_layers(apply, params, x)
    assert report.recorded == ("w",)
    assert "scan changes it" in report.others["moving"]
    assert layer_inputs(apply)(params, x)["w"].shape == (8, 4)


# --- what else models do ------------------------------------------------------------------------


def test_a_jitted_and_rematerialised_model_in_bfloat16_is_seen_through():
    class Mixed(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = linen.remat(linen.Dense)(8, dtype=jnp.bfloat16, name="first")(x)
            return linen.Dense(3, dtype=jnp.bfloat16, name="second")(jax.nn.gelu(hidden))

    apply, params, x = linen_case(Mixed(), normal(1, 2, 4))
    rows = layer_inputs(jax.jit(apply))(params, x)
    assert rows["first/kernel"].dtype == rows["second/kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows["first/kernel"], x.astype(jnp.bfloat16))


def test_uses_in_several_dtypes_are_recorded_in_float32():
    def apply(params, x):
        half = x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
        return half.astype(jnp.float32) + x @ params["w"]

    rows = layer_inputs(apply)({"w": normal(1, 4, 4)}, normal(2, 3, 4))["w"]
    assert (rows.shape, rows.dtype) == ((6, 4), jnp.float32)


def test_a_custom_derivative_without_a_layer_inside_is_kept():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, gradient: (gradient,))

    def apply(params, x):
        return jnp.sum(straight_through(x @ straight_through(params["w"])) @ params["v"])

    params, x = {"w": 3 * normal(1, 4, 4), "v": normal(2, 4, 2)}, normal(3, 5, 4)
    mapped = map_inputs(apply, lambda layer, x, extra: x)
    gradients = jax.jit(jax.grad(mapped))(params, {}, x)
    chex.assert_trees_all_close(gradients, jax.jit(jax.grad(apply))(params, x), rtol=1e-5)
    assert float(jnp.abs(gradients["w"]).max()) > 0
    report = find_layers(apply, params, x)
    assert report.recorded == ("v",)
    assert "round" in report.others["w"]


def test_a_layer_inside_a_function_with_its_own_derivative_is_found():
    @jax.custom_jvp
    def dense(kernel, x):
        return x @ kernel

    dense.defjvp(lambda primals, tangents: (dense(*primals), dense(primals[0], tangents[1])))
    x = normal(1, 3, 4)
    check_layer((lambda params, x: dense(params["w"], x), {"w": normal(2, 4, 2)}, x), "w", x)


def test_find_layers_gives_a_reason_for_each_parameter_that_is_not_recorded():
    params = {
        "masked": normal(1, 4, 4),
        "table": normal(2, 9, 4),
        "unused": normal(3, 2, 2),
        "branch": normal(4, 4, 4),
        "loop": normal(5, 4, 4),
        "low": normal(6, 4, 4),
        "both": normal(7, 4, 6),
        "empty": jnp.zeros((0, 4)),
        "split": normal(8, 3, 8),
        "odd": normal(10, 6, 4),
        "rounded": normal(11, 4, 4),
        "compressed": QTensor(jnp.zeros((2, 2), jnp.int8), jnp.ones((1, 1))),
        "counts": jnp.zeros((2, 2), jnp.int32),
        "bias": jnp.zeros(4),
        "seen": normal(9, 4, 4),
    }

    def apply(params, tokens):
        x = params["table"][tokens]
        x = x @ (params["masked"] * jnp.eye(4))
        x = lax.cond(tokens[0] > 0, lambda w, x: x @ w, lambda w, x: x, params["branch"], x)
        x = lax.fori_loop(0, tokens[0], lambda _, x: x @ params["loop"], x)
        x = x @ (params["low"] @ params["low"]) + params["bias"][None, :]
        x = (x @ params["both"]) @ params["both"].T
        x = x + jnp.einsum("nhr,hro->no", x.reshape(-1, 2, 2), params["seen"].reshape(2, 2, 4))
        heads = jnp.einsum("bhi,ohi->bho", x.reshape(-1, 2, 2)[:, :, :1], params["split"]
                           .reshape(3, 2, 4)[:, :, :1])  # fmt: skip
        x = x @ params["rounded"].astype(jnp.int32).astype(jnp.float32)
        return x, heads, x[:, :3] @ params["odd"].reshape(8, 3).T

    report = find_layers(apply, params, jnp.array([1, 2]))
    assert report.recorded == ("seen",)
    expected = {
        "masked": "used by mul",
        "table": "used by gather",
        "unused": "never used",
        "branch": "used by cond",
        "loop": "used by while",
        "low": "another parameter",
        "both": "contracted (0,) and (1,)",
        "empty": "it is empty",
        "split": "used by slice",
        "odd": "used by reshape",
        "rounded": "used by convert_element_type",
        "compressed": "jopt.materialize",
    }
    assert set(report.others) == set(expected)
    for path, words in expected.items():
        assert words in report.others[path], path
    assert len(report.layers["both"]) == 2


def test_an_axis_that_is_both_summed_and_batched_is_reported():
    params, x = {"w": normal(1, 6, 5)}, normal(2, 4, 2, 3)

    def apply(params, x):
        return jnp.einsum("bhi,hio->bho", x, params["w"].reshape(2, 3, 5))

    assert "a reshape that divides its axis 0" in find_layers(apply, params, x).others["w"]
    assert layer_inputs(apply)(params, x) == {}


def test_heads_that_interleave_in_an_output_axis_are_reported():
    params, x = {"w": normal(1, 5, 12)}, normal(2, 2, 3, 5)

    def apply(params, x):
        return jnp.einsum("bhi,idh->bhd", x, params["w"].reshape(5, 4, 3))

    assert "interleaves groups of its axis 1" in find_layers(apply, params, x).others["w"]


def test_a_product_without_a_sum_is_no_layer():
    params, x = {"w": normal(1, 4, 5)}, normal(2, 3, 4)

    def apply(params, x):
        return jnp.einsum("bi,io->bio", x, params["w"])

    assert "without a sum" in find_layers(apply, params, x).others["w"]


def test_find_layers_needs_shapes_only():
    params = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert find_layers(lambda params, x: x @ params["w"], params, x).recorded == ("w",)


# --- changing inputs ----------------------------------------------------------------------------


def identity(layer, x, extra):
    del layer, extra
    return x


def quantize(layer, x, step):
    """Round to a step that is straight through in the gradient and learned; None leaves alone."""
    del layer
    if step is None:
        return x
    return x + lax.stop_gradient(step * jnp.round(x / step) - x) + (step - lax.stop_gradient(step))


def test_an_unchanged_input_changes_neither_outputs_nor_gradients(network, images):
    apply, params = network
    mapped = map_inputs(apply, identity)
    results = [
        jax.jit(jax.value_and_grad(lambda p, f=f: jnp.sum(f(p) ** 2)))(params)
        for f in (lambda p: mapped(p, {}, images), lambda p: apply(p, images))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_networks_of_linen_and_nnx_record_each_kernel(network, images):
    apply, params = network
    report = find_layers(apply, params, images)
    assert set(report.recorded) == {"conv/kernel", "hidden/kernel", "head/kernel"}
    assert report.others == {}
    rows = jax.eval_shape(layer_inputs(apply), params, images)
    assert {path: array.shape for path, array in rows.items()} == {
        "conv/kernel": (32, 9),
        "hidden/kernel": (2, 64),
        "head/kernel": (2, 8),
    }


def plain_model(params, x):
    hidden = jax.nn.relu(x @ params["first"] + params["bias"][None, :])
    return hidden @ params["second"]


def test_rounding_inputs_equals_rounding_by_hand_with_gradients(variant):
    params = {"first": normal(1, 4, 5), "bias": normal(2, 5), "second": normal(3, 5, 2)}
    steps, x = {"second": jnp.float32(0.25)}, normal(4, 6, 4)

    def by_hand(params, steps, x):
        hidden = jax.nn.relu(x @ params["first"] + params["bias"][None, :])
        return quantize(None, hidden, steps["second"]) @ params["second"]

    mapped = variant(map_inputs(plain_model, quantize))
    np.testing.assert_allclose(mapped(params, steps, x), by_hand(params, steps, x), rtol=1e-5)
    results = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(params, steps, x)
        for f in (mapped, by_hand)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
    assert abs(float(results[0][1]["second"])) > 0


def test_extras_of_scanned_layers_are_sliced_with_them():
    params, x = {"w": normal(1, 3, 4, 4)}, normal(2, 5, 4)
    steps = jnp.array([0.5, 0.25, 0.125])

    def apply(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    def by_hand(steps):
        hidden = x
        for kernel, step in zip(params["w"], steps, strict=True):
            hidden = jnp.tanh(quantize(None, hidden, step) @ kernel)
        return hidden

    mapped = map_inputs(apply, quantize)
    np.testing.assert_allclose(mapped(params, {"w": steps}, x), jax.jit(by_hand)(steps), atol=1e-5)
    gradient, expected = (
        jax.jit(jax.grad(lambda steps, f=f: jnp.sum(f(steps))))(steps)
        for f in (lambda steps: mapped(params, {"w": steps}, x), by_hand)
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"extras\['w'\] has shape \(2,\).*3 entries"):
        mapped(params, {"w": steps[:2]}, x)


def test_changed_inputs_pass_through_remat_and_vmap():
    module = linen.remat(linen.Dense)(3)
    apply, params, x = linen_case(module, normal(1, 2, 4))
    mapped = map_inputs(apply, lambda layer, x, extra: 2 * x + extra)
    extras = {"kernel": jnp.arange(5.0)[:, None, None] * jnp.ones((2, 4))[None, :, :]}
    outputs = jax.vmap(mapped, in_axes=(None, 0, None))(params, extras, x)
    for i in range(5):
        np.testing.assert_allclose(outputs[i], run(apply, params, 2 * x + i), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda params: jnp.sum(mapped(params, {"kernel": 1.0}, x)))(params)
    expected = np.sum(2 * np.asarray(x) + 1, 0)
    np.testing.assert_allclose(gradient["kernel"][:, 0], expected, rtol=1e-4)


def test_a_change_is_told_which_layer_and_which_axes(network, images):
    apply, params = network
    told = {}

    def change(layer, x, extra):
        told[layer.path] = (layer.kind, layer.features, x.shape[layer.input_axes[0]], extra)
        return x

    jax.eval_shape(map_inputs(apply, change), params, {}, images)
    assert told == {
        "conv/kernel": ("conv", 9, 1, None),
        "hidden/kernel": ("dot", 64, 64, None),
        "head/kernel": ("dot", 8, 8, None),
    }


def test_both_transforms_compile_once_for_equal_shapes():
    params, x = {"w": normal(1, 4, 2)}, normal(2, 3, 4)
    apply = chex.assert_max_traces(lambda params, x: x @ params["w"], n=2)
    record, change = layer_inputs(apply), map_inputs(apply, identity)
    for _ in range(3):
        record(params, x)
        change(params, {}, x)


def test_the_transforms_keep_to_strict_dtypes(network, images):
    apply, params = network
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(layer_inputs(apply), params, images)
        jax.eval_shape(map_inputs(apply, identity), params, {}, images)


# --- errors -------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    params, x = {"w": jnp.ones((4, 2))}, jnp.ones((3, 4))
    not_callable: Any = "model"
    for make in (layer_inputs, functools.partial(map_inputs, change=identity)):
        with pytest.raises(TypeError, match="apply must be a function"):
            make(not_callable)
    with pytest.raises(TypeError, match="apply must be a function"):
        find_layers(not_callable, params)
    with pytest.raises(TypeError, match="change must be a function"):
        map_inputs(plain_model, not_callable)
    with pytest.raises(ValueError, match="params must hold at least one array"):
        find_layers(lambda params: 0, {})
    with pytest.raises(ValueError, match="params must hold at least one array"):
        layer_inputs(lambda params: 0)({})

    def apply(params, x):
        return x @ params["w"]

    with pytest.raises(ValueError, match=r"extras has \['v'\], not layers.*\['w'\]"):
        map_inputs(apply, identity)(params, {"v": 1.0}, x)
    for change in (lambda layer, x, extra: x[:1], lambda layer, x, extra: x.astype(jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"layer 'w' float32\[3, 4\]; it made"):
            map_inputs(apply, change)(params, {}, x)
    layer = find_layers(apply, params, x).layers["w"][0]
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 4\)"):
        to_matrix(layer, params["w"].T)
    with pytest.raises(ValueError, match=r"matrix has shape \(4, 3\)"):
        from_matrix(layer, jnp.ones((4, 3)))
