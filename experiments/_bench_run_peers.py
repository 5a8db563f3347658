"""What others run: ONNX Runtime, PyTorch, qwix and AQT, each only where it is installed.

Threads of ONNX Runtime and PyTorch spin for a while after their work is done, and would take the
cores from whoever is timed next. So these run in a process of their own, which is halted while it
is not their turn.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Side = Callable[[], Any]
HAS_ORT = all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_QWIX = importlib.util.find_spec("qwix") is not None
HAS_AQT = importlib.util.find_spec("aqt") is not None
GROUP = 64


class Other:
    """A side that runs in a process of its own, halted between its turns."""

    def __init__(self, make: Callable[..., Side], arguments: list[tuple[Any, ...]]) -> None:
        """Start the process.

        Args:
          make: a function of a module, returns what is timed.
          arguments: of each call of `make`; all that it returns run one after the other.
        """
        spawn = multiprocessing.get_context("spawn")
        self._pipe, end = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(end, make, arguments), daemon=True)
        self._process.start()
        end.close()
        self._pipe.recv()
        self._halt(True)

    def _halt(self, halt: bool) -> None:
        if self._process.pid is not None and hasattr(signal, "SIGSTOP"):
            os.kill(self._process.pid, signal.SIGSTOP if halt else signal.SIGCONT)

    def seconds(self) -> float:
        """Return how long one run of everything took, timed in that process."""
        self._halt(False)
        self._pipe.send(True)
        found = self._pipe.recv()
        self._halt(True)
        return found

    def close(self) -> None:
        """End the process."""
        self._halt(False)
        self._process.kill()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Side], arguments: list[tuple[Any, ...]]) -> None:
    sides = [make(*each) for each in arguments]
    for side in sides:
        side()
    pipe.send(True)
    while pipe.recv():
        start = time.perf_counter()
        for side in sides:
            side()
        pipe.send(time.perf_counter() - start)


def onnx_model(nodes: list[Any], arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> bytes:
    """Write a graph from `x` to `y`, both floats, as a model.

    Args:
      nodes: in order.
      arrays: what they read, by name.
      shape: of `x`.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=sets, ir_version=8)
    return onnx.ModelProto.SerializeToString(made)


def _session(nodes: list[Any], constants: dict[str, np.ndarray], x: np.ndarray) -> Side:
    """Return what runs an ONNX graph from `x` to `y`, two floating-point matrices."""
    return session(onnx_model(nodes, constants, x.shape), {"x": x})


def session(model: Any, feed: dict[str, np.ndarray]) -> Side:
    """Return what runs an ONNX model, bytes or a path, on as many threads as there are cores."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    from experiments import _results

    with contextlib.suppress(Exception):  # set already: all sessions of a process share one pool
        onnxruntime.set_global_thread_pool_sizes(_results.cores(), 1)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    run = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: run.run(None, feed)


def ort_float(kernel: np.ndarray, x: np.ndarray) -> Side:
    """Multiply floats, `(rows, inputs)` by `(inputs, outputs)`."""
    from onnx import helper  # pyright: ignore[reportMissingImports]

    return _session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": kernel}, x)


def ort_int8(kernel: np.ndarray, x: np.ndarray) -> Side:
    """Round inputs as they come, and multiply by int8 with one scale for each output."""
    from onnx import helper  # pyright: ignore[reportMissingImports]

    scale = np.abs(kernel).max(0) / 127
    codes = np.round(kernel / scale).astype(np.int8)
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "w", "scale", "zero"], ["y"], domain="com.microsoft"
    )
    zero = np.zeros(len(scale), np.int8)
    return _session([node], {"w": codes, "scale": scale.astype(np.float32), "zero": zero}, x)


def ort_int4(kernel: np.ndarray, x: np.ndarray) -> Side:
    """Multiply by 4-bit codes in groups of 64 inputs, inputs rounded to int8."""
    from onnx import helper  # pyright: ignore[reportMissingImports]

    inputs, outputs = kernel.shape
    groups = kernel.T.reshape(outputs, inputs // GROUP, GROUP)
    scale = np.abs(groups).max(2) / 7
    codes = (np.round(groups / scale[..., None]) + 8).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "scale"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    return _session([node], {"w": packed, "scale": scale.ravel().astype(np.float32)}, x)


def torch_sparse(kernel: np.ndarray, x: np.ndarray) -> Side:
    """Multiply by compressed rows, `(outputs, inputs)` by `(inputs, rows)`."""
    import torch  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(np.ascontiguousarray(kernel.T)).to_sparse_csr()
    columns = torch.from_numpy(np.ascontiguousarray(x.T))

    def run() -> Any:
        with torch.no_grad():
            return torch.mv(rows, columns[:, 0]) if columns.shape[1] == 1 else rows @ columns

    return run


def torch_depthwise(kernel: np.ndarray, x: np.ndarray, times: int) -> Side:
    """Convolve each channel by itself so many times, channels last, padded as "same"."""
    import torch  # pyright: ignore[reportMissingImports]

    weights = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    images = images.contiguous(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.no_grad():
            found = images
            for _ in range(times):
                found = torch.nn.functional.conv2d(
                    found, weights, padding=kernel.shape[0] // 2, groups=kernel.shape[3]
                )
            return found

    return run


def qwix_int8(module: Any, params: Any, x: Any) -> Side:
    """Run a linen model after qwix's quantization to int8, inputs rounded as they come."""
    import jax
    import qwix  # pyright: ignore[reportMissingImports]

    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    model = qwix.quantize_model(module, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    quantized = qwix.quantize_params(params["params"], abstract)
    run = jax.jit(lambda params, x: model.apply({"params": params}, x))
    return lambda: run(quantized, x)


def aqt_int8(make: Callable[[Any], Any], params: Any, x: Any) -> Side:
    """Serve a linen model by AQT in int8, weights converted before, inputs rounded as they come.

    Args:
      make: takes the class of products of its dense layers to the model.
      params: of the model.
      x: its inputs.
    """
    from functools import partial

    import jax
    from aqt.jax.v2 import config  # pyright: ignore[reportMissingImports]
    from aqt.jax.v2.flax import aqt_flax  # pyright: ignore[reportMissingImports]

    mode, freeze = aqt_flax.QuantMode, aqt_flax.FreezerMode.CALIBRATION_AND_VALUE
    products = partial(aqt_flax.AqtDotGeneral, config.config_v3())
    convert, serve = (
        make(partial(products, rhs_quant_mode=each, rhs_freeze_mode=freeze))
        for each in (mode.CONVERT, mode.SERVE)
    )
    frozen = convert.apply(params, x, mutable=True, rngs={"params": jax.random.key(0)})[1]
    kept = {name: part for name, part in frozen.items() if name != "params"} | params
    run = jax.jit(lambda params, x: serve.apply(params, x, rngs={"params": jax.random.key(0)}))
    return lambda: run(kept, x)
