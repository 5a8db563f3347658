import jax
import jax.numpy as jnp
import pytest

import jopt
from jopt import quant
from jopt._trees import flatten_with_paths, map_selected


def test_paths_are_the_same_for_linen_and_nnx(network):
    _, params = network
    paths = flatten_with_paths(params)[0]
    assert {"conv/kernel", "head/bias", "norm/scale"} <= set(paths)


def test_a_regex_must_match_the_whole_path(network):
    _, params = network
    chosen = jopt.select(params, "head/.*|hidden/kernel")
    paths = flatten_with_paths(params)[0]
    picked = {path for path, take in zip(paths, jax.tree.leaves(chosen), strict=True) if take}
    assert picked == {"head/kernel", "head/bias", "hidden/kernel"}
    with pytest.raises(ValueError, match="where='head' matches no leaf"):
        jopt.select(params, "head")


def test_a_filter_that_matches_nothing_lists_the_paths(network):
    _, params = network
    with pytest.raises(ValueError, match="'conv/kernel'.*'norm/scale'"):
        jopt.select(params, "no_such_layer/.*")
    with pytest.raises(ValueError, match="the tree is empty"):
        jopt.select({})
    with pytest.raises(ValueError, match="and 5 more"):
        jopt.select({f"layer_{i:02d}": 1.0 for i in range(25)}, "x")


def test_a_predicate_sees_path_and_leaf(network):
    _, params = network
    chosen = jopt.select(params, lambda path, leaf: leaf.ndim == 1 and path.startswith("norm"))
    assert sum(jax.tree.leaves(chosen)) == 2


def test_a_filter_of_another_type_is_refused():
    with pytest.raises(TypeError, match="regex or a predicate"):
        jopt.select({"a": jnp.ones(2)}, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"where='\*kernel' is not a regular expression: nothing"):
        jopt.select({"a": jnp.ones(2)}, "*kernel")


def test_the_default_filter_takes_kernels_and_leaves_compressed_leaves_alone(network):
    _, params = network
    once = quant.quantize_params(params, quant.QuantSpec(8), "head/kernel")
    twice = quant.quantize_params(once, quant.QuantSpec(4))
    leaves = dict(zip(*flatten_with_paths(twice)[:2], strict=True))
    assert leaves["head/kernel"].codes.dtype == jnp.int8
    assert leaves["conv/kernel"].codes.dtype == jnp.int4
    assert not jopt.is_compressed(leaves["norm/scale"])


def test_map_selected_changes_only_what_is_chosen():
    tree = {"a": jnp.ones(2), "b": (jnp.ones(2), None)}
    changed = map_selected(lambda path, leaf: leaf * 2, tree, "b/0")
    assert changed["a"] is tree["a"]
    assert changed["b"][0][0] == 2 and changed["b"][1] is None


def test_a_key_named_value_of_a_dict_is_kept():
    assert flatten_with_paths({"value": 1, "b": {"value": 2}})[0] == ["b/value", "value"]
