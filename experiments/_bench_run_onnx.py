"""EfficientNet-Lite0 as an ONNX graph, for a runtime that jopt is timed against."""

from typing import Any

import numpy as np

from experiments import _bench_run_peers
from experiments._networks import STAGES

Tree = Any


class _Graph:
    """Nodes in order, and the arrays that they read."""

    def __init__(self, variables: Tree) -> None:
        self.params, self.limits = variables["params"], variables["limits"]
        self.nodes: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node with one output, which is called like it."""
        from onnx import helper  # pyright: ignore[reportMissingImports]

        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def array(self, name: str, values: Any) -> str:
        """Add an array of floats."""
        self.arrays[name] = np.asarray(values, np.float32)
        return name

    def conv(self, x: str, name: str, stride: int = 1, relu6: bool = True) -> str:
        """Add a convolution with "same" padding, as many groups as its kernel says, and ReLU6."""
        kernel = np.asarray(self.params[name]["kernel"]).transpose(3, 2, 0, 1)
        depthwise = name.endswith("_depthwise")
        inputs = [
            x,
            self.array(f"{name}_kernel", kernel),
            self.array(f"{name}_bias", self.params[name]["bias"]),
        ]
        found = self.add(
            "Conv",
            inputs,
            name,
            strides=[stride, stride],
            group=len(kernel) if depthwise else 1,
            auto_pad="SAME_UPPER",
        )
        if not relu6:
            return found
        (limit,) = set(np.asarray(self.limits[f"{name}_limit"]).tolist())
        ends = [self.array(f"{name}_0", 0.0), self.array(f"{name}_limit", limit)]
        return self.add("Clip", [found, *ends], f"{name}_relu6")


def efficientnet(variables: Tree, shape: tuple[int, ...]) -> bytes:
    """Write the folded network as an ONNX model from `x`, images with channels second, to `y`.

    Args:
      variables: of `EfficientNetLite0(folded=True)`, with the same limit for all channels.
      shape: of the images, (batch, 3, height, width).
    """
    graph = _Graph(variables)
    x, channels, number = graph.conv("x", "stem", 2), 32, 0
    for _, stride, expansion, features, repeats in STAGES:
        for repeat in range(repeats):
            name, y, step = f"block{number}", x, stride if repeat == 0 else 1
            if expansion > 1:
                y = graph.conv(y, f"{name}_expand")
            y = graph.conv(y, f"{name}_depthwise", step)
            y = graph.conv(y, f"{name}_project", relu6=False)
            skips = step == 1 and channels == features
            x = graph.add("Add", [x, y], f"{name}_sum") if skips else y
            channels, number = features, number + 1
    x = graph.add("GlobalAveragePool", [graph.conv(x, "head")], "pool")
    x = graph.add("Flatten", [x], "flat")
    last = graph.params["classifier"]
    ends = [graph.array("classifier", last["kernel"]), graph.array("classifier_bias", last["bias"])]
    graph.add("Gemm", [x, *ends], "y")
    return _bench_run_peers.onnx_model(graph.nodes, graph.arrays, shape)
