"""Losses between intermediate activations.

Losses are per example, the caller reduces (`.mean()`); no gradient flows into the teacher, and all
but `vid_loss` are zero, with a gradient of zero, where the student's features are the teacher's.
Features are (examples, ..., channels), channels last; maps have two or more axes of places between.
Where the widths differ, the student's features go through a projector first: `_projectors.py`.
"""

import jax
import jax.numpy as jnp

from jopt.distill._checks import constant, example_mean, paired, unit_vectors, widened


def hint_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Measure the mean squared difference of features.

    `mean (s - t)^2` over all axes but the first. The paper has half of the sum of squares.

    Args:
      student_features: floats, (examples, ...), after a projector where the widths differ.
      teacher_features: floats, the same shape; taken as constants.

    Returns:
      Floats of shape (examples,).

    Raises:
      ValueError: the shapes differ, or there are fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> print(hint_loss(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]])))
      [2.]

    References:
      Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, https://arxiv.org/abs/1412.6550,
      equation 3.
    """
    student, teacher = paired(student_features, teacher_features, "features", least=2)
    return example_mean((student - teacher) ** 2)


def attention_map(features: jax.Array, power: int = 2) -> jax.Array:
    """Return where a layer looks: `sum_c |F_c|^power` for each place, scaled to length one.

    Args:
      features: floats, (examples, ..., channels).
      power: at least 1; higher looks more at the strongest channels.

    Returns:
      Floats of shape (examples, places).

    Raises:
      ValueError: there are fewer than three axes, or `power` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> found = attention_map(jnp.array([[[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]]))
      >>> [round(x, 4) for x in found[0].tolist()]
      [0.6, 0.8]
    """
    if features.ndim < 3:
        raise ValueError(
            f"features must have shape (examples, places..., channels), not {features.shape}."
        )
    if power < 1:
        raise ValueError(f"power must be at least 1, not {power!r}.")
    features = widened(features)
    strength = features**2 if power == 2 else jnp.abs(features) ** power
    places = jnp.sum(strength, axis=-1).reshape(features.shape[0], -1)
    return unit_vectors(places)


def attention_transfer_loss(
    student_features: jax.Array, teacher_features: jax.Array, power: int = 2
) -> jax.Array:
    """Ask the student to look where the teacher looks, with as many channels as it likes.

    `mean over places (A_s - A_t)^2`, with A the `attention_map`: the authors' code. The paper's
    equation has the length of the difference, whose gradient does not exist at agreement. Its
    weight is large for that reason: beta = 1000, halved, in the authors' code.

    Args:
      student_features: floats, (examples, ..., channels).
      teacher_features: floats, the same but for the number of channels; taken as constants.
      power: of the attention map.

    Returns:
      Floats of shape (examples,).

    Raises:
      ValueError: the shapes differ in more than channels, there are fewer than three axes, or
        `power` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[[3.0], [0.0]]])  # all attention on the first place
      >>> teacher = jnp.array([[[0.0, 0.0], [1.0, 2.0]]])  # and on the second
      >>> print(attention_transfer_loss(student, teacher))
      [1.]

    References:
      Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of
      Convolutional Neural Networks via Attention Transfer", 2017,
      https://arxiv.org/abs/1612.03928, equation 2.
    """
    _check_places(student_features, teacher_features)
    student = attention_map(student_features, power)
    teacher = attention_map(constant(teacher_features), power)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def _check_places(
    one: jax.Array, other: jax.Array, names: str = "student_features and teacher_features"
) -> None:
    if one.shape[:-1] != other.shape[:-1] or one.ndim < 3:
        raise ValueError(
            f"{names} must have shape (examples, places..., channels) and differ in channels only, "
            f"not {one.shape} and {other.shape}."
        )


def flow_matrix(first: jax.Array, second: jax.Array) -> jax.Array:
    """Return how the features of one layer relate to those of a later one (FSP).

    `G_ij = mean over places F_i F'_j`.

    Args:
      first: floats, (examples, places..., m).
      second: floats, (examples, places..., n), the same places.

    Returns:
      Floats of shape (examples, m, n).

    Raises:
      ValueError: the shapes differ in more than channels, or there are fewer than three axes.

    Example:
      >>> import jax.numpy as jnp
      >>> first = jnp.array([[[1.0], [3.0]]])  # one example, two places, one channel
      >>> print(flow_matrix(first, jnp.array([[[1.0, 0.0], [1.0, 2.0]]])))  # two channels
      [[[2. 3.]]]

    References:
      Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
      Transfer Learning", 2017, equation 1.
    """
    _check_places(first, second, "first and second")
    first, second = (
        widened(each).reshape(each.shape[0], -1, each.shape[-1]) for each in (first, second)
    )
    return jnp.einsum("bpi,bpj->bij", first, second) / first.shape[1]


def flow_loss(
    student_pair: tuple[jax.Array, jax.Array], teacher_pair: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Ask the student to solve the teacher's steps: the mean squared difference of flow matrices.

    Args:
      student_pair: features of an earlier and a later layer, (examples, places..., channels).
      teacher_pair: those of the teacher, with as many channels; taken as constants.

    Returns:
      Floats of shape (examples,).

    Raises:
      ValueError: the numbers of channels or examples differ, or places within a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> one, two = jnp.ones((1, 2, 1)), 2 * jnp.ones((1, 2, 1))
      >>> print(flow_loss((one, one), (one, two)))
      [1.]

    References:
      Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
      Transfer Learning", 2017, equation 2.
    """
    student = flow_matrix(*student_pair)
    student, teacher = paired(student, flow_matrix(*teacher_pair), "pair flow matrices", least=3)
    return example_mean((student - teacher) ** 2)


def neuron_selectivity_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Match the distributions of what single neurons select (NST), by a polynomial kernel.

    The maximum mean discrepancy between the sets of the student's and the teacher's channels, every
    channel a vector over places of length one, under `k(x, y) = (x . y)^2`:
    `mean k(t, t') + mean k(s, s') - 2 mean k(s, t)`.

    Args:
      student_features: floats, (examples, places..., channels).
      teacher_features: floats, the same but for the number of channels; taken as constants.

    Returns:
      Floats of shape (examples,).

    Raises:
      ValueError: the shapes differ in more than channels, or there are fewer than three axes.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[[3.0], [0.0]]])  # a neuron for the first place
      >>> teacher = jnp.array([[[0.0], [1.0]]])  # a neuron for the second
      >>> print(neuron_selectivity_loss(student, teacher))
      [2.]

    References:
      Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
      https://arxiv.org/abs/1707.01219, equation 5, with d = 2 and c = 0.
    """
    _check_places(student_features, teacher_features)
    student, teacher = (
        unit_vectors(each.reshape(each.shape[0], -1, each.shape[-1]), axis=1)
        for each in (widened(student_features), constant(teacher_features))
    )

    def kernel(first: jax.Array, second: jax.Array) -> jax.Array:
        return example_mean(jnp.einsum("bpi,bpj->bij", first, second) ** 2)

    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


def vid_loss(
    student_features: jax.Array, teacher_features: jax.Array, raw_variance: jax.Array
) -> jax.Array:
    """Raise a lower bound of the information that the student has about the teacher's features.

    `mean (log v_c + (t - s)^2 / v_c) / 2`, the negative log-likelihood, but for a constant, of the
    teacher's features under a normal distribution around the student's; `v = softplus(raw) + 1e-5`
    is learned for each channel, so that channels which cannot be told stop counting. It is not zero
    at agreement: there the gradient of the features is zero, and that of the variance asks for less
    of it.

    Args:
      student_features: floats, (examples, ..., channels), the output of a projector.
      teacher_features: floats, the same shape; taken as constants.
      raw_variance: floats, (channels,), trained; the paper starts at a variance of 5,
        `raw = log(exp(5) - 1)`.

    Returns:
      Floats of shape (examples,).

    Raises:
      ValueError: the shapes differ, or `raw_variance` is not one per channel.

    Example:
      >>> import jax.numpy as jnp
      >>> raw = jnp.log(jnp.e - 1 - 1e-5)[None]  # a variance of one
      >>> print(vid_loss(jnp.array([[3.0]]), jnp.array([[1.0]]), raw).round(3))
      [2.]

    References:
      Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019,
      https://arxiv.org/abs/1904.05835, equation 6.
    """
    student, teacher = paired(student_features, teacher_features, "features", least=2)
    if raw_variance.shape != student_features.shape[-1:]:
        raise ValueError(
            f"raw_variance must have shape {student_features.shape[-1:]}, one per channel, not "
            f"{raw_variance.shape}."
        )
    variance = jax.nn.softplus(widened(raw_variance)) + 1e-5
    variance = variance.reshape((1,) * (student.ndim - 1) + variance.shape)
    return example_mean(0.5 * (jnp.log(variance) + (student - teacher) ** 2 / variance))
