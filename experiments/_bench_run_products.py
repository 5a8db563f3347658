"""Products of one matrix: compressed against XLA's floats, and against what others have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jopt
from experiments import _bench_run_peers as peers
from jopt import quant, run

Side = Callable[[], Any]
Tree = Any
FLOAT = "XLA float32"
WARM = 8  # calls in a row of a warm case
CACHE = 48 << 20  # bytes of compressed matrices that no cache of these machines holds


class Case(NamedTuple):
    """What is timed side by side.

    Attributes:
      name: what it is.
      sides: by name; the first is XLA's, on floats.
      ours: which side is held against the others.
      goal: how many times faster than the first side it should be, or None.
      others: sides of other libraries, and how many times faster than each `ours` should be.
      copies: how many calls one turn of a side is: of as many matrices in cold cases.
      bytes: what `ours` reads of one matrix.
      operations: multiplications and additions of one product.
      difference: the largest, between `ours` and the plain path, by the largest output.
    """

    name: str
    sides: dict[str, Any]
    ours: str
    goal: float | None = None
    others: tuple[tuple[str, float], ...] = ()
    copies: int = 1
    bytes: int = 0
    operations: int = 0
    difference: float = 0.0


def _largest(outputs: jax.Array, expected: jax.Array) -> float:
    return float(jnp.abs(outputs - expected).max() / jnp.abs(expected).max())


def repeated(case: Case) -> Case:
    """Let each turn of a side be as many calls as the case has copies: in a row, so warm."""

    def again(side: Side) -> Side:
        return lambda: [side() for _ in range(case.copies)]

    sides = {
        name: side if isinstance(side, peers.Other) else again(side)
        for name, side in case.sides.items()
    }
    return case._replace(sides=sides)


def _draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(params: Tree, x: jax.Array) -> jax.Array:
    """Multiply by one kernel."""
    return x @ params["w"]


def _all(function: Callable[..., Any], trees: list[Tree], x: Any) -> Side:
    """Run a product with each tree in one program, as a network does."""
    run_all = jax.jit(lambda trees, x: [function(tree, x) for tree in trees])
    return lambda: run_all(trees, x)


def product(
    name: str,
    size: tuple[int, int, int],
    make: Callable[[jax.Array], Any],
    activations: str,
    peer: tuple[str, Callable[..., Side], bool, float] | None,
    goal: float,
    cold: bool,
    sparse: float | None = None,
    *,
    smoke: bool,
) -> Case:
    """Return one case.

    Args:
      name: what it is.
      size: rows, inputs and outputs.
      make: from a kernel to what `prepare` takes.
      activations: as `jopt.run.compressed` has it.
      peer: its name, what makes its side, whether it is installed, and the goal.
      goal: against XLA's floats.
      cold: whether matrices rotate, more than caches hold.
      sparse: as `jopt.run.prepare` has it.
      smoke: whether small matrices do.
    """
    rows, inputs, outputs = (min(n, 128) for n in size) if smoke else size
    x = jnp.asarray(_draw((rows, inputs), 0))
    first = {"w": make(jnp.asarray(_draw((inputs, outputs), 1)))}
    read = jopt.nbytes(run.prepare(dense, first, x, sparse=sparse))
    copies = min(max(2, -(-CACHE // read)), 12) if cold else WARM
    different = copies if cold and not smoke else 1
    kernels = [jnp.asarray(_draw((inputs, outputs), 1 + seed)) for seed in range(different)]
    compressed = [{"w": make(kernel)} for kernel in kernels[:different]]
    laid_out = [run.prepare(dense, tree, x, sparse=sparse) for tree in compressed]
    prepared = laid_out * (copies // different)
    floats = [jopt.materialize(tree) for tree in compressed] * (copies // different)
    fast, plain = run.compressed(dense, activations=activations), jax.jit(dense)
    sides: dict[str, Any] = {
        FLOAT: _all(plain, floats, x),
        "jopt": _all(fast, prepared, x),
    }
    if peer is not None and peer[2]:
        host = [np.asarray(tree["w"]) for tree in floats]
        sides[peer[0]] = peers.Other(peer[1], [(kernel, np.asarray(x)) for kernel in host])
    expected = plain(floats[0], x)
    apart = _largest(fast(prepared[0], x), expected)
    return Case(
        name,
        sides,
        "jopt",
        goal,
        () if peer is None else ((peer[0], peer[3]),),
        copies,
        read,
        2 * rows * inputs * outputs,
        apart,
    )


def _pruned(kernel: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(kernel) > 1.645, kernel, 0)  # nine in ten of normal weights


def _emptied(kernel: jax.Array) -> jax.Array:
    draw = np.random.default_rng(0)
    inputs, outputs = (draw.permutation(size) < size // 2 for size in kernel.shape)
    return kernel * (inputs[:, None] & outputs)


def binary(smoke: bool) -> Case:
    """Signs by signs, packed in bits, against the product of floats."""
    size = 128 if smoke else 4096
    x = jnp.asarray(_draw((1, size), 0))
    leaf = quant.binarize(jnp.asarray(_draw((size, size), 1)))
    matrix = run.prepare(dense, {"w": leaf}, x)["w"]
    floats = jopt.materialize(leaf)
    plain, fast = jax.jit(lambda kernel, x: jnp.sign(x) @ kernel), jax.jit(run.binary_product)
    sides = {FLOAT: lambda: plain(floats, x), "jopt": lambda: fast(x, matrix)}
    xla = jax.jit(lambda bits, x: quant.binary_matmul(quant.pack_signs(x, -1), bits, size))
    sides["jopt in XLA"] = lambda: xla(leaf.bits, x)
    apart = _largest(fast(x, matrix), plain(floats, x))
    name = f"binary 1x{size}x{size}, warm"
    return repeated(
        Case(name, sides, "jopt", 15.0, (), WARM, size * size // 8, 2 * size * size, apart)
    )


def depthwise(smoke: bool) -> Case:
    """Depthwise convolutions, 3x3 on 144 channels of 56x56: each reads what the last one wrote."""
    from flax import linen

    channels, size = (8, 8) if smoke else (144, 56)
    module = linen.Conv(channels, (3, 3), feature_group_count=channels, use_bias=False)
    x = jnp.asarray(_draw((1, size, size, channels), 0))
    params = module.init(jax.random.key(0), x)

    def in_turn(params: Tree, x: jax.Array) -> Any:
        for _ in range(WARM):
            x = module.apply(params, x)  # pyright: ignore[reportAssignmentType]
        return x

    plain, fast = jax.jit(in_turn), run.compressed(in_turn)
    sides: dict[str, Any] = {
        FLOAT: lambda: plain(params, x),
        "jopt": lambda: fast(params, x),
    }
    if peers.HAS_TORCH:
        kernel = np.asarray(jax.tree.leaves(params)[0])
        about = kernel, np.asarray(x), WARM
        sides["PyTorch"] = peers.Other(peers.torch_depthwise, [about])
    apart = _largest(fast(params, x), plain(params, x))
    operations = 2 * 9 * size * size * channels
    name = f"depthwise 3x3, {channels} channels, {size}x{size}, warm"
    moved = 8 * size * size * channels
    goal, others = 70.0, (("PyTorch", 0.9),)
    return Case(name, sides, "jopt", goal, others, WARM, moved, operations, apart)


def cases(smoke: bool) -> list[Callable[[], Case]]:
    """Return what makes each case, so that one is in memory at a time."""

    def eight(kernel: jax.Array) -> Any:
        return quant.quantize(kernel, quant.QuantSpec(8))

    def four(kernel: jax.Array) -> Any:
        return quant.quantize(kernel, quant.QuantSpec(4, (64, 1)))

    def few(kernel: jax.Array) -> Any:
        return eight(_pruned(kernel))

    ort4 = ("ONNX Runtime MatMulNBits", peers.ort_int4, peers.HAS_ORT, 1.1)
    ort8 = ("ONNX Runtime int8", peers.ort_int8, peers.HAS_ORT, 1.0)
    csr = ("PyTorch CSR", peers.torch_sparse, peers.HAS_TORCH, 1.8)
    csr_cold = (*csr[:3], 3.0)
    large, small, many = (1, 4096, 4096), (1, 1024, 1024), (32, 1024, 1024)
    one, several = "matvec 4096x4096", "matmul 32x1024x1024"
    half = "half of the inputs and outputs zeros"

    def matvec(*about: Any) -> Callable[[], Case]:
        return lambda: product(*about, smoke=smoke)

    return [
        matvec(f"{one}, W4-g64 A8, cold", large, four, "int8", ort4, 6.0, True),
        matvec(f"{one}, W4-g64 A8, warm", large, four, "int8", ort4, 6.0, False),
        matvec(f"{one}, W8A8, cold", large, eight, "int8", ort8, 3.5, True),
        matvec(f"{one}, W8A8, warm", large, eight, "int8", ort8, 3.5, False),
        matvec(f"{one}, W8, cold", large, eight, "float", None, 1.0, True),
        matvec("matvec 1024x1024, W8A8, warm", small, eight, "int8", (*ort8[:3], 1.3), 4.0, False),
        matvec(f"{several}, 90 % zeros, warm", many, _pruned, "float", csr, 4.0, False),
        matvec(f"{several}, 90 % zeros, W8, warm", many, few, "float", csr, 4.0, False, 0.88),
        matvec(f"{one}, 90 % zeros, cold", large, _pruned, "float", csr_cold, 5.0, True),
        matvec(f"{one}, 90 % zeros, W8, cold", large, few, "float", csr_cold, 5.0, True),
        matvec(f"{one}, 90 % zeros, W8A8, cold", large, few, "int8", csr_cold, 5.0, True),
        matvec(f"{several}, {half}, warm", many, _emptied, "float", None, 1.0, False),
        matvec(f"{one}, {half}, cold", large, _emptied, "float", None, 1.0, True),
        lambda: binary(smoke),
        lambda: depthwise(smoke),
    ]
