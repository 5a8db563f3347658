"""Which layer of a deep teacher each layer of a shallow student learns from."""


def _check_layers(student_layers: int, teacher_layers: int) -> None:
    if student_layers < 1:
        raise ValueError(f"student_layers must be at least 1, not {student_layers}.")
    if student_layers > teacher_layers:
        raise ValueError(
            f"student_layers must not exceed teacher_layers, but {student_layers} > "
            f"{teacher_layers}."
        )


def uniform_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Pair the student's layers with evenly spaced layers of the teacher.

    `floor((m + 1) * N / M) - 1` for student layer m of M and N teacher layers, all counted from 0:
    the last layer learns from the last, and no two from the same one. Where M divides N this is
    TinyBERT's map and the one of PKD-skip, which leaves out the last pair because the soft labels
    teach that already: drop it with `[:-1]`. Where M does not divide N, which the papers do not
    treat, the lower layer is taken. For hidden states that begin with the embedding, pair
    embedding with embedding and add 1 to every index.

    Args:
      student_layers: number of the student's layers, M, at least 1.
      teacher_layers: number of the teacher's layers, N, at least M.

    Returns:
      A teacher layer, 0 to N - 1, for each student layer, in increasing order.

    Raises:
      ValueError: the student has no layer, or more than the teacher.

    Example:
      >>> uniform_layer_map(4, 12)
      (2, 5, 8, 11)
      >>> uniform_layer_map(3, 5)
      (0, 2, 4)

    References:
      Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu, "TinyBERT: Distilling BERT for Natural Language
      Understanding", 2020, https://arxiv.org/abs/1909.10351, section 4.2 (g(m) = 3 m).
      Sun, Cheng, Gan, Liu, "Patient Knowledge Distillation for BERT Model Compression", 2019,
      https://arxiv.org/abs/1908.09355, section 3.2.
    """
    _check_layers(student_layers, teacher_layers)
    return tuple((m + 1) * teacher_layers // student_layers - 1 for m in range(student_layers))


def last_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Pair the student's layers with the last layers of the teacher.

    `N - M + m` for student layer m of M and N teacher layers, all counted from 0. PKD-last leaves
    out the last pair, because the soft labels teach that already: drop it with `[:-1]`.

    Args:
      student_layers: number of the student's layers, M, at least 1.
      teacher_layers: number of the teacher's layers, N, at least M.

    Returns:
      A teacher layer, 0 to N - 1, for each student layer, in increasing order.

    Raises:
      ValueError: the student has no layer, or more than the teacher.

    Example:
      >>> last_layer_map(3, 12)
      (9, 10, 11)

    References:
      Sun, Cheng, Gan, Liu, "Patient Knowledge Distillation for BERT Model Compression", 2019,
      https://arxiv.org/abs/1908.09355, section 3.2.
    """
    _check_layers(student_layers, teacher_layers)
    return tuple(range(teacher_layers - student_layers, teacher_layers))
