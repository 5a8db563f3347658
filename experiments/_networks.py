"""Networks that people use, in Flax linen, with the layers and widths of the published ones."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

# Kernel, stride, expansion, outputs, repeats: the seven stages of EfficientNet-Lite0.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet without squeeze-and-excite and with ReLU6: 4.65 million parameters.

    Images are (batch, height, width, 3). Batch statistics are in `batch_stats`. With batch norms
    folded it runs as `EfficientNetLite0(folded=True)`, whose convolutions have biases; `limits`
    then holds where each channel's ReLU6 cuts off, which is 6 until channels are scaled.
    """

    num_classes: int = 1000
    folded: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map images to logits."""

        def norm(x: Array, name: str) -> Array:
            if self.folded:
                return x
            return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, name=name)(x)

        def relu6(x: Array, name: str) -> Array:
            if not self.folded:
                return nn.relu6(x)
            limits = self.variable("limits", f"{name}_limit", jnp.full, x.shape[-1:], 6.0)
            return jnp.clip(x, 0, limits.value[None, None, None])

        def conv(x: Array, features: int, size: int, stride: int, groups: int, name: str) -> Array:
            return nn.Conv(
                features,
                (size, size),
                (stride, stride),
                feature_group_count=groups,
                use_bias=self.folded,
                name=name,
            )(x)

        x = relu6(norm(conv(x, 32, 3, 2, 1, "stem"), "stem_norm"), "stem")
        number = 0
        for size, stride, expansion, features, repeats in STAGES:
            for repeat in range(repeats):
                name, inputs, y = f"block{number}", x.shape[-1], x
                if expansion > 1:
                    y = conv(y, expansion * inputs, 1, 1, 1, f"{name}_expand")
                    y = relu6(norm(y, f"{name}_expand_norm"), f"{name}_expand")
                step, width = (stride if repeat == 0 else 1), y.shape[-1]
                y = conv(y, width, size, step, width, f"{name}_depthwise")
                y = relu6(norm(y, f"{name}_depthwise_norm"), f"{name}_depthwise")
                y = norm(conv(y, features, 1, 1, 1, f"{name}_project"), f"{name}_project_norm")
                x = x + y if step == 1 and inputs == features else y
                number += 1
        x = relu6(norm(conv(x, 1280, 1, 1, 1, "head"), "head_norm"), "head")
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))


class ResNet(nn.Module):
    """The residual network of He et al. for small images, by default of 20 layers.

    Shortcuts of blocks that change shape drop pixels and pad channels with zeros, as in the paper
    (its option A): 0.27 million parameters.
    """

    num_classes: int = 10
    widths: Sequence[int] = (16, 32, 64)
    blocks: int = 3

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map images (batch, height, width, channel) to logits."""

        def conv(x: Array, features: int, stride: int, name: str) -> Array:
            conv = nn.Conv(features, (3, 3), (stride, stride), use_bias=False, name=name)
            return nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(conv(x))

        x = nn.relu(conv(x, self.widths[0], 1, "stem"))
        for stage, features in enumerate(self.widths):
            for block in range(self.blocks):
                name, stride = f"block{stage}_{block}", 2 if stage and not block else 1
                y = nn.relu(conv(x, features, stride, f"{name}_first"))
                y = conv(y, features, 1, f"{name}_second")
                more = features - x.shape[-1]
                x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, more)))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))
