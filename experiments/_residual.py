"""Residual networks as the distillation experiment uses them: trained, measured, folded."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments import _convolution, _models, _train
from jopt import layers

Tree = Any
ESTIMATED = 4096  # training images that batch norms are estimated on


@dataclasses.dataclass(frozen=True)
class Network:
    """A residual network of some widths.

    Attributes:
      widths: of its stages.
      blocks: in each stage.
      classes: that it tells apart.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    classes: int = 10

    @cached_property
    def normed(self) -> _models.ResidualCNN:
        """Return it with batch norms."""
        return _models.ResidualCNN(self.classes, self.widths, self.blocks)

    @cached_property
    def folded(self) -> _models.ResidualCNN:
        """Return it with biases instead."""
        return self.normed.clone(normalize=None)

    @cached_property
    def visible(self) -> _models.ResidualCNN:
        """Return the folded one with XLA's convolutions, whose multiply-adds are counted."""
        return self.folded.clone(
            convolve=_convolution.conv_windows_direct,
            convolve_same=_convolution.conv_same_direct,
        )

    def initial(self, key: Array, shape: Sequence[int]) -> Tree:
        """Return fresh parameters for images of a shape (height, width, channel)."""
        return jax.jit(self.normed.init)(key, jnp.zeros((1, *shape)))["params"]

    def training(self, params: Tree, images: Array) -> _models.Features:
        """Run with the statistics of the batch itself."""
        variables = {"params": params, "batch_stats": fresh_averages(params)}
        return self.normed.apply(variables, images, True)  # pyright: ignore[reportReturnType]

    def fold(self, params: Tree, images: Array) -> Tree:
        """Fold the batch norms in, with the averages of these normalized images."""
        batches = [images[at : at + 512] for at in range(0, len(images) - 511, 512)] or [images]
        averages = layers.reestimate_batch_norm(
            self._moved, params, fresh_averages(params), batches
        )
        return folded(params, averages)

    def _moved(self, params: Tree, averages: Tree, images: Array) -> Tree:
        """Return the running averages after a batch."""
        variables = {"params": params, "batch_stats": averages}
        moved = self.normed.apply(variables, images, True, mutable=["batch_stats"])[1]
        return moved["batch_stats"]

    def features(self, params: Tree, images: Array) -> _models.Features:
        """Run the folded network."""
        return self.folded.apply({"params": params}, images)  # pyright: ignore[reportReturnType]

    def two_sided(self, params: Tree, images: Array) -> _models.Features:
        """Average what the folded network makes of images and of their mirror images."""
        one, other = (self.features(params, each) for each in (images, images[:, :, ::-1]))
        other = other._replace(maps=other.maps[:, :, ::-1])
        return jax.tree.map(lambda a, b: (a + b) / 2, one, other)

    def two_sided_logits(self, params: Tree, images: Array) -> Array:
        """Return the logits of `two_sided`."""
        return self.two_sided(params, images).logits

    def logits(self, params: Tree, images: Array) -> Array:
        """Run the folded network, for its logits alone."""
        return self.features(params, images).logits

    def visible_logits(self, params: Tree, images: Array) -> Array:
        """Run the folded network with XLA's own convolutions."""
        return self.visible.apply({"params": params}, images).logits  # pyright: ignore

    def accuracy(self, params: Tree, part: tuple[Array, Array], two_sided: bool = False) -> float:
        """Return the accuracy of folded parameters."""
        logits = self.two_sided_logits if two_sided else self.logits
        return round(1 - _train.error_rate(logits, params, *part), 6)


# Methods of the same object are the same function to jit: what is compiled once serves all seeds.
shared_network = lru_cache(Network)


def fresh_averages(params: Tree) -> Tree:
    """Return running averages as they are before any step."""
    sizes = {
        name: leaf["scale"].shape[0] for name, leaf in params.items() if name.endswith("_norm")
    }
    return {name: {"mean": jnp.zeros(size), "var": jnp.ones(size)} for name, size in sizes.items()}


def folded(params: Tree, averages: Tree) -> Tree:
    """Fold batch norms into kernels and biases."""
    found = {}
    for name, leaf in params.items():
        norm = params.get(f"{name}_norm")
        if name.endswith("_norm"):
            continue
        if norm is None:
            found[name] = leaf
            continue
        stats = averages[f"{name}_norm"]
        factor = norm["scale"] * jax.lax.rsqrt(stats["var"] + _models.EPSILON)
        found[name] = {
            "kernel": leaf["kernel"] * factor[None, None, None],
            "bias": norm["bias"] - stats["mean"] * factor,
        }
    return found
