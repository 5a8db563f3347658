"""Contrastive representation distillation (CRD), its memory bank a state that is passed along.

    state = contrastive_init(key, examples, dims)
    negatives = contrastive_negatives(key, indices, examples, count)
    losses = contrastive_loss(state, student, teacher, indices, negatives)
    state = contrastive_update(state, student, teacher, indices, negatives)

The loss looks at the state before the update. `student` and `teacher` are embeddings of one width:
a projection of each network's features, which the caller learns together with the student.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jopt.distill._checks import (
    Scalar,
    check_fraction,
    check_positive,
    check_whole,
    unit_vectors,
)


class ContrastiveState(NamedTuple):
    """The embeddings of all training examples as last seen, and the scale of the scores.

    Attributes:
      student_bank: floats, (examples, dims), the student's embeddings.
      teacher_bank: floats, (examples, dims), the teacher's embeddings.
      student_log_normalizer: float, (), log of the constant Z by which the exponentials of the
        student's scores against the teacher's bank are divided; minus infinity until it is set.
      teacher_log_normalizer: the same for the teacher's scores against the student's bank.
    """

    student_bank: jax.Array
    teacher_bank: jax.Array
    student_log_normalizer: jax.Array
    teacher_log_normalizer: jax.Array


def contrastive_init(key: jax.Array, examples: int, dims: int) -> ContrastiveState:
    """Fill both banks at random.

    Entries are uniform in `[-sqrt(3 / dims), sqrt(3 / dims))`: rows have length one in the mean
    square. The normalizers are set by the first update.

    Args:
      key: a random key.
      examples: number of training examples, at least 2.
      dims: width of the embeddings, at least 1.

    Returns:
      The state, in float32.

    Raises:
      ValueError: `examples` or `dims` is too small.

    Example:
      >>> import jax
      >>> state = contrastive_init(jax.random.key(0), examples=5, dims=3)
      >>> state.student_bank.shape, float(state.student_log_normalizer)
      ((5, 3), -inf)

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
      https://arxiv.org/abs/1910.10699; the initial values are those of the authors' code.
    """
    if examples < 2:
        raise ValueError(f"examples must be at least 2, a positive and a negative, not {examples}.")
    if dims < 1:
        raise ValueError(f"dims must be at least 1, not {dims}.")
    limit = math.sqrt(3 / dims)
    keys = jax.random.split(key)
    student_bank, teacher_bank = (
        jax.random.uniform(key, (examples, dims), jnp.float32, -limit, limit) for key in keys
    )
    unset = jnp.array(-jnp.inf, jnp.float32)
    return ContrastiveState(student_bank, teacher_bank, unset, unset)


def _check_places(name: str, places: jax.Array, shape: tuple[int, ...]) -> None:
    if places.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {places.shape}.")
    check_whole(name, places)


def contrastive_negatives(
    key: jax.Array, indices: jax.Array, examples: int, count: int
) -> jax.Array:
    """Draw other examples for each example of a batch, uniformly and with replacement.

    The authors' code draws from all examples, the positive one too; here it is never drawn.

    Args:
      key: a random key.
      indices: whole numbers, (batch,), each in [0, examples): the positives.
      examples: number of training examples, at least 2.
      count: number of negatives for each positive, at least 1.

    Returns:
      int32 of shape (batch, count), each in [0, examples), none equal to its row's index.

    Raises:
      ValueError: `indices` is no vector, or `examples` or `count` is too small.
      TypeError: the indices are not whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> contrastive_negatives(jax.random.key(0), jnp.array([0, 1]), examples=2, count=3)
      Array([[1, 1, 1],
             [0, 0, 0]], dtype=int32)

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
      https://arxiv.org/abs/1910.10699, section 3.
    """
    _check_places("indices", indices, indices.shape[:1])
    if examples < 2:
        raise ValueError(f"examples must be at least 2, a positive and a negative, not {examples}.")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}.")
    draws = jax.random.randint(key, (indices.shape[0], count), 0, examples - 1, jnp.int32)
    # All places but the positive's: those from it on move up by one.
    return jnp.where(draws >= indices.astype(jnp.int32)[:, None], draws + 1, draws)


def _prepare(
    state: ContrastiveState,
    student: jax.Array,
    teacher: jax.Array,
    indices: jax.Array,
    negatives: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the checked embeddings with length one, and the places, the positive's first."""
    batch, dims = indices.shape[0] if indices.ndim else 0, state.student_bank.shape[1]
    _check_places("indices", indices, (batch,))
    for name, embeddings in (("student_embeddings", student), ("teacher_embeddings", teacher)):
        if embeddings.shape != (batch, dims):
            raise ValueError(
                f"{name} must have shape {(batch, dims)}, (batch, dims of the bank), "
                f"not {embeddings.shape}."
            )
    if negatives.ndim != 2 or negatives.shape[1] < 1:
        raise ValueError(f"negatives must have shape (batch, count), not {negatives.shape}.")
    _check_places("negatives", negatives, (batch, negatives.shape[1]))
    dtype = state.student_bank.dtype
    places = jnp.concatenate([indices.astype(jnp.int32)[:, None], negatives.astype(jnp.int32)], 1)
    return unit_vectors(student.astype(dtype)), unit_vectors(teacher.astype(dtype)), places


def _scores(
    embeddings: jax.Array, bank: jax.Array, places: jax.Array, temperature: Scalar
) -> jax.Array:
    """Return each embedding's products with its places of the bank over the temperature."""
    bank = jax.lax.stop_gradient(bank)
    precision = jax.lax.Precision.HIGHEST  # a small temperature enlarges the rounding
    if places.shape[1] * bank.shape[1] < bank.shape[0]:
        products = jnp.einsum("bd,bkd->bk", embeddings, bank[places], precision=precision)
    else:  # Many negatives: a copy of their rows would be larger than products with all rows.
        everything = jnp.matmul(embeddings, bank.T, precision=precision)
        products = jnp.take_along_axis(everything, places, axis=1)
    return products / temperature


def _both_scores(
    state: ContrastiveState,
    student: jax.Array,
    teacher: jax.Array,
    places: jax.Array,
    temperature: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """Return the student's scores against the teacher's bank, and the other way round."""
    return (
        _scores(student, state.teacher_bank, places, temperature),
        _scores(teacher, state.student_bank, places, temperature),
    )


def _measured_log_normalizer(scores: jax.Array, examples: int) -> jax.Array:
    """Return `log(examples * mean(exp(scores)))`."""
    return jax.nn.logsumexp(scores) + math.log(examples / scores.size)


def _direction(scores: jax.Array, log_normalizer: jax.Array, examples: int) -> jax.Array:
    """Return the loss of one side's scores against the other side's bank."""
    measured = _measured_log_normalizer(scores, examples)
    log_normalizer = jnp.where(jnp.isneginf(log_normalizer), measured, log_normalizer)
    count = scores.shape[1] - 1
    log_odds = scores - jax.lax.stop_gradient(log_normalizer) - math.log(count / examples)
    positive, negative = log_odds[:, 0], log_odds[:, 1:]
    return jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negative), axis=1)


def contrastive_loss(
    state: ContrastiveState,
    student_embeddings: jax.Array,
    teacher_embeddings: jax.Array,
    indices: jax.Array,
    negatives: jax.Array,
    temperature: Scalar = 0.07,
) -> jax.Array:
    """Tell the bank's entry of the same example from those of N others, in both directions.

    `-log h(positive) - sum over negatives of log(1 - h(negative))` with `h = p / (p + N / M)`,
    `p = exp(<embedding, entry> / temperature) / Z` and M examples in the bank: of the student's
    embedding against the teacher's bank, plus of the teacher's embedding against the student's.
    While the state's Z is not set, `Z = M * mean(exp(<embedding, entry> / temperature))` of this
    batch, a constant; the paper's equation has no Z, the authors' code has. Their 1e-7 in the
    denominator is left out: in logarithms nothing needs it.

    The loss is not zero where student and teacher agree: it is least where each example's
    embeddings are alike and unlike those of others, and no gradient flows into the banks. It does
    flow into both embeddings, since the teacher's projection is learned as well: put
    `jax.lax.stop_gradient` on the teacher's features before they are projected.

    Needs the smaller of `batch * M` and `batch * (N + 1) * dims` floats of memory.

    Args:
      state: the banks before this batch, from `contrastive_init` or `contrastive_update`.
      student_embeddings: floats, (batch, dims); scaled to length one here.
      teacher_embeddings: floats, (batch, dims); scaled to length one here.
      indices: whole numbers, (batch,), each in [0, M): which training examples these are.
      negatives: whole numbers, (batch, N), in [0, M): other examples, from
        `contrastive_negatives`.
      temperature: positive; smaller is stricter. The authors' code has 0.07.

    Returns:
      Floats of shape (batch,), one loss for each example.

    Raises:
      ValueError: shapes do not fit, or a temperature known at trace time is not positive.
      TypeError: the indices or negatives are not whole numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> bank = jnp.array([[1.0], [-1.0]])
      >>> state = ContrastiveState(bank, bank, jnp.float32(0), jnp.float32(0))  # Z = 1, M = 2
      >>> embeddings, indices, negatives = jnp.array([[3.0]]), jnp.array([0]), jnp.array([[1]])
      >>> loss = contrastive_loss(
      ...     state, embeddings, embeddings, indices, negatives, temperature=1.0
      ... )
      >>> round(loss.item(), 4)  # 2 * (log(1 + 1 / (2 e)) + log(1 + 2 / e))
      1.4406

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
      https://arxiv.org/abs/1910.10699, section 3.
    """
    check_positive("temperature", temperature)
    student, teacher, places = _prepare(
        state, student_embeddings, teacher_embeddings, indices, negatives
    )
    examples = state.student_bank.shape[0]
    student_scores, teacher_scores = _both_scores(state, student, teacher, places, temperature)
    return _direction(student_scores, state.student_log_normalizer, examples) + _direction(
        teacher_scores, state.teacher_log_normalizer, examples
    )


def _first_normalizers(state, student, teacher, places, temperature):
    examples = state.student_bank.shape[0]
    both = _both_scores(state, student, teacher, places, temperature)
    return tuple(_measured_log_normalizer(scores, examples) for scores in both)


def _same_normalizers(state, student, teacher, places, temperature):
    return state.student_log_normalizer, state.teacher_log_normalizer


def _moved(bank: jax.Array, embeddings: jax.Array, indices: jax.Array, momentum: Scalar):
    rows = momentum * bank[indices] + (1 - momentum) * embeddings
    return bank.at[indices].set(unit_vectors(rows))


def contrastive_update(
    state: ContrastiveState,
    student_embeddings: jax.Array,
    teacher_embeddings: jax.Array,
    indices: jax.Array,
    negatives: jax.Array,
    temperature: Scalar = 0.07,
    momentum: Scalar = 0.5,
) -> ContrastiveState:
    """Move the banks' entries towards a batch's embeddings.

    `entry <- unit(momentum * entry + (1 - momentum) * unit(embedding))`, at the indices alone. The
    first update also sets the normalizers, to what `contrastive_loss` used for the same arguments;
    later ones keep them, and then neither negatives nor temperature matter. An index must not occur
    twice in a batch: which of its embeddings would count is not defined.

    Args:
      state: the banks before this batch.
      student_embeddings: floats, (batch, dims); scaled to length one here, taken as constants.
      teacher_embeddings: floats, (batch, dims); scaled to length one here, taken as constants.
      indices: whole numbers, (batch,), each in [0, M) and once.
      negatives: whole numbers, (batch, N), in [0, M), those of the loss.
      temperature: positive, that of the loss.
      momentum: 0 to 1; what an entry keeps.

    Returns:
      The new state.

    Raises:
      ValueError: shapes do not fit, or a `temperature` or `momentum` known at trace time is out of
        range.
      TypeError: the indices or negatives are not whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> state = contrastive_init(jax.random.key(0), 2, 2)._replace(student_bank=jnp.eye(2))
      >>> embeddings = jnp.array([[0.0, 5.0]])
      >>> state = contrastive_update(
      ...     state, embeddings, embeddings, jnp.array([0]), jnp.array([[1]])
      ... )
      >>> print(state.student_bank.round(4))  # halfway from (1, 0) to (0, 1)
      [[0.7071 0.7071]
       [0.     1.    ]]

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020,
      https://arxiv.org/abs/1910.10699; the update is that of the authors' code.
    """
    check_positive("temperature", temperature)
    check_fraction("momentum", momentum)
    student, teacher, places = _prepare(
        state, student_embeddings, teacher_embeddings, indices, negatives
    )
    student, teacher = jax.lax.stop_gradient((student, teacher))
    # Functions of this module, not closures: called eagerly, cond compiles them once.
    student_log_normalizer, teacher_log_normalizer = jax.lax.cond(
        jnp.isneginf(state.student_log_normalizer),
        _first_normalizers,
        _same_normalizers,
        *(state, student, teacher, places, temperature),
    )
    return jax.lax.stop_gradient(
        ContrastiveState(
            _moved(state.student_bank, student, indices, momentum),
            _moved(state.teacher_bank, teacher, indices, momentum),
            student_log_normalizer,
            teacher_log_normalizer,
        )
    )
