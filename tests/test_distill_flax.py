"""The documented ways to intermediate activations, and students that are made of the teacher."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jopt
from jopt import distill, prune, quant

IMAGES = jax.random.normal(jax.random.key(0), (6, 4, 4, 1))


class Block(linen.Module):
    """A convolution that tells what it made."""

    width: int

    @linen.compact
    def __call__(self, x):
        hidden = linen.relu(linen.Conv(self.width, (3, 3))(x))
        self.sow("intermediates", "strength", jnp.abs(hidden).sum(-1))
        return hidden


class Linen(linen.Module):
    """Two blocks and a head."""

    width: int

    @linen.compact
    def __call__(self, x):
        for number in range(2):
            x = Block(self.width, name=f"block_{number}")(x)
        return linen.Dense(3, name="head")(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    """A convolution that keeps what it made."""

    def __init__(self, inputs, width, rngs):
        self.conv = nnx.Conv(inputs, width, (3, 3), rngs=rngs)

    def __call__(self, x):
        hidden = nnx.relu(self.conv(x))
        self.sow(nnx.Intermediate, "features", hidden)
        return hidden


class Nnx(nnx.Module):
    """Two blocks and a head."""

    def __init__(self, width, rngs):
        self.block_0 = NnxBlock(1, width, rngs)
        self.block_1 = NnxBlock(width, width, rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block_1(self.block_0(x)).mean((1, 2)))


def test_linen_features_teach_through_a_projector():
    student, teacher = Linen(2), Linen(5)
    first, second = (
        each.init(jax.random.key(n), IMAGES)["params"] for n, each in enumerate((student, teacher))
    )

    def features(model, params):
        state: Any
        _, state = model.apply(
            {"params": params}, IMAGES, capture_intermediates=True, mutable=["intermediates"]
        )
        found = state["intermediates"]["block_1"]
        return found["__call__"][0], found["strength"][0]

    def loss(params):
        hidden, strength = features(student, params["student"])
        target, target_strength = features(teacher, second)
        assert strength.shape == target_strength.shape == (6, 4, 4)
        hint = distill.hint_loss(distill.project(params["projector"], hidden), target)
        return (hint + distill.attention_transfer_loss(hidden, target)).mean()

    params = {"student": first, "projector": distill.init_projector(jax.random.key(2), 2, 5)}
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["projector"]))
    assert np.abs(gradient["student"]["block_0"]["Conv_0"]["kernel"]).max() > 0
    assert np.abs(gradient["student"]["head"]["kernel"]).max() == 0  # after the features


def test_nnx_features_teach_through_a_projector():
    student, teacher = Nnx(2, nnx.Rngs(0)), Nnx(5, nnx.Rngs(1))
    graph, first = nnx.split(student, nnx.Param)

    def features(model):
        _, state = nnx.capture(model, nnx.Intermediate)(IMAGES)
        return state["block_1"]["features"][0]

    target = features(teacher)

    def loss(params):
        hidden = features(nnx.merge(graph, params["student"]))
        return distill.hint_loss(distill.project(params["projector"], hidden), target).mean()

    params = {"student": first, "projector": distill.init_projector(jax.random.key(2), 2, 5)}
    gradient = jax.jit(jax.grad(loss))(params)
    assert np.abs(gradient["student"]["block_0"]["conv"]["kernel"][...]).max() > 0
    assert np.abs(gradient["projector"]["kernel"]).max() > 0


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_pruned_and_quantized_copy_learns_from_the_teacher_it_was(kind):
    if kind == "linen":
        model = Linen(8)
        teacher: Any = model.init(jax.random.key(0), IMAGES)["params"]
        apply: Any = lambda params: model.apply({"params": params}, IMAGES)  # noqa: E731
    else:
        graph, teacher = nnx.split(Nnx(8, nnx.Rngs(0)), nnx.Param)
        apply = lambda params: nnx.capture(  # noqa: E731
            nnx.merge(graph, params), nnx.Intermediate
        )(IMAGES)[0]

    masks = prune.global_topk_masks(prune.magnitude_scores(teacher), 0.5)
    spec = quant.QuantSpec(bits=4)
    soft = jax.jit(apply)(teacher)
    tx = optax.chain(optax.adam(1e-2), prune.keep_masked(masks))

    def loss(params):
        logits = apply(quant.fake_quantize_params(params, spec))
        return distill.kd_loss(logits, soft, 2.0).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = prune.apply_masks(teacher, masks)
    (student, _), values = jax.jit(
        lambda carry: jax.lax.scan(step, carry, length=150)
    )((start, tx.init(start)))  # fmt: skip
    assert values[-1] < 0.2 * values[0]
    assert prune.sparsity(student) == pytest.approx(float(prune.sparsity(start)), abs=1e-6)
    packed = quant.quantize_params(student, spec)
    found = distill.kd_loss(jax.jit(apply)(jopt.materialize(packed)), soft, 2.0).mean()
    np.testing.assert_allclose(found, loss(student), rtol=1e-3, atol=1e-6)


def test_students_of_several_widths_learn_in_one_program():
    """Each is the widest with hidden units masked: one vmap trains all, shrink cuts them."""
    inputs = jax.random.normal(jax.random.key(1), (64, 5))
    keys = jax.random.split(jax.random.key(2), 2)
    teacher = {
        "hidden": {"kernel": jax.random.normal(keys[0], (5, 16))},
        "head": {"kernel": jax.random.normal(keys[1], (16, 3))},
    }

    def apply(params, x):
        return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]

    groups = prune.find_groups(apply, teacher, inputs)
    (name,) = groups.groups
    family = [
        prune.unit_masks(groups, teacher, {name: jnp.arange(16) < width}) for width in (2, 6, 12)
    ]
    masks = distill.stack_params(family)
    start = jax.vmap(prune.apply_masks, (None, 0))(teacher, masks)
    tx = optax.adam(3e-2)

    def train(params, masks):
        chain = optax.chain(tx, prune.keep_masked(masks))

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(
                lambda p: distill.kd_loss(apply(p, inputs), apply(teacher, inputs), 1.0).mean()
            )(params)
            updates, state = chain.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, chain.init(params)), length=200)
        return params, values

    students, values = jax.jit(jax.vmap(train))(start, masks)
    assert np.all(values[:, -1] < 0.5 * values[:, 0])
    assert values[2, -1] < values[0, -1]  # the wider, the closer
    for number, (width, mask) in enumerate(zip((2, 6, 12), family, strict=True)):
        one = jax.tree.map(lambda leaf, n=number: leaf[n], students)
        small = prune.shrink(apply, one, mask, inputs)
        assert small.params["hidden"]["kernel"].shape == (5, width)
        np.testing.assert_allclose(
            small.apply(small.params, inputs), apply(one, inputs), rtol=1e-4, atol=1e-4
        )
