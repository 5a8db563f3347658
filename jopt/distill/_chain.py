"""Students that become teachers: generations, and assistants between large and small networks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Network = TypeVar("Network")


def distill_chain(
    teacher: Network, students: Sequence[Callable[[Network], Network]]
) -> list[Network]:
    """Train each student with the one before it as its teacher.

    Students of the teacher's own size are born-again generations, whose answers
    `ensemble_logits` joins; students that shrink step by step are teacher assistants, which bridge
    the gap to a teacher that is too large to learn from.

    Args:
      teacher: the first teacher: parameters, or parameters together with what applies them, as the
        students need it.
      students: functions `teacher -> student`, each of which trains one.

    Returns:
      The students, in order; the last is the end of the chain.

    Raises:
      ValueError: there is no student.

    Example:
      >>> distill_chain(8.0, [lambda teacher: teacher / 2] * 3)
      [4.0, 2.0, 1.0]

    References:
      Furlanello et al., "Born-Again Neural Networks", 2018, https://arxiv.org/abs/1805.04770.
      Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", 2020,
      https://arxiv.org/abs/1902.03393.
    """
    if not students:
        raise ValueError("students must hold at least one function, teacher -> student.")
    trained = []
    for train in students:
        teacher = train(teacher)
        trained.append(teacher)
    return trained
