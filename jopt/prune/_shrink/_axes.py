"""Axes of arrays, and which of them must keep the same units.

Every dimension of every array in a program is an `Axis`. Where two arrays are added, their axes are
*unified*: a unit taken off one must be taken off the other. An axis may turn out to be a product
(a flattened image: height, width, channels) or a sum (two arrays concatenated); it is divided when
a reshape, a slice or another axis asks for it, and every array that has it sees that. What is left
undivided in the end are the leaves; a leaf that nothing has *locked* is a group of units that can
be pruned, one index of it being one unit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

LEAF, PRODUCT, SUM = "leaf", "product", "sum"


class Axis:
    """One dimension of an array; a node of a union-find forest.

    Attributes:
      size: how many indices it has.
      kind: `LEAF`, or `PRODUCT` (parts slowest first) or `SUM` (parts one after the other).
      parts: of a product or a sum.
      reason: why no unit of a leaf can be removed, or None.
      target: the axis that this one was unified with, or None.
    """

    __slots__ = ("kind", "parts", "reason", "size", "target")

    def __init__(self, size: int, reason: str | None = None) -> None:
        """Make a leaf."""
        self.size = size
        self.kind = LEAF
        self.parts: tuple[Axis, ...] = ()
        self.reason = reason
        self.target: Axis | None = None


def find(axis: Axis) -> Axis:
    """Return the axis that stands for all that this one was unified with."""
    while axis.target is not None:
        if axis.target.target is not None:
            axis.target = axis.target.target
        axis = axis.target
    return axis


def leaves(axis: Axis) -> list[Axis]:
    """List the leaves of an axis, slowest or first one first.

    Example:
      >>> [leaf.size for leaf in leaves(product([Axis(2), Axis(3)]))]
      [2, 3]
    """
    axis = find(axis)
    if axis.kind == LEAF:
        return [axis]
    return [leaf for part in axis.parts for leaf in leaves(part)]


def all_leaves(axes: Iterable[Axis]) -> list[Axis]:
    """List the leaves of several axes."""
    return [leaf for axis in axes for leaf in leaves(axis)]


def lock(axes: Iterable[Axis], reason: str) -> None:
    """Forbid that units of these axes are removed; the first reason given is kept."""
    for leaf in all_leaves(axes):
        leaf.reason = leaf.reason or reason


def factors(axis: Axis) -> list[Axis]:
    """Return the factors of an axis, products opened, factors of size one left out."""
    axis = find(axis)
    if axis.kind == PRODUCT:
        return [factor for part in axis.parts for factor in factors(part)]
    return [] if axis.size == 1 else [axis]


def summands(axis: Axis) -> list[Axis]:
    """Return the summands of an axis, sums opened, empty ones left out."""
    axis = find(axis)
    if axis.kind == SUM:
        return [summand for part in axis.parts for summand in summands(part)]
    return [axis] if axis.size else []


def _composed(kind: str, parts: Sequence[Axis], size: int) -> Axis:
    axis = Axis(size)
    axis.kind, axis.parts = kind, tuple(parts)
    return axis


def product(parts: Sequence[Axis]) -> Axis:
    """Return the axis whose indices run through those of the parts, the last one fastest."""
    parts = [factor for part in parts for factor in factors(part)]
    if not parts:
        return Axis(1, "it has one unit")
    return parts[0] if len(parts) == 1 else _composed(PRODUCT, parts, math.prod(_sizes(parts)))


def total(parts: Sequence[Axis]) -> Axis:
    """Return the axis whose indices are those of the parts one after the other."""
    parts = [summand for part in parts for summand in summands(part)]
    if not parts:
        return Axis(0, "it has no unit")
    return parts[0] if len(parts) == 1 else _composed(SUM, parts, sum(_sizes(parts)))


def _sizes(axes: Iterable[Axis]) -> list[int]:
    return [axis.size for axis in axes]


def divide(leaf: Axis, kind: str, sizes: Sequence[int]) -> tuple[Axis, ...]:
    """Turn a leaf into a product or a sum of new leaves of these sizes."""
    leaf.kind, leaf.parts = kind, tuple(Axis(size, leaf.reason) for size in sizes)
    leaf.reason = None
    return leaf.parts


def unify(one: Axis, other: Axis, operation: str) -> None:
    """Make two axes lose the same units; where their structures do not fit, none.

    Args:
      one: an axis.
      other: an axis of the same size.
      operation: what asks for it, for the reason if it cannot be done.

    Example:
      >>> flat, image = Axis(6), product([Axis(2), Axis(3)])
      >>> unify(flat, image, "add")
      >>> [leaf.size for leaf in leaves(flat)]
      [2, 3]
    """
    one, other = find(one), find(other)
    if one is other or one.size <= 1:
        return
    if one.kind != LEAF and other.kind == LEAF:
        one, other = other, one
    if one.kind == LEAF:
        one.target = other
        if one.reason:
            lock([other], one.reason)
    elif not (_aligned if one.kind == other.kind else _grouped)(one, other, operation):
        lock([one, other], f"{operation} joins axes that are divided in different ways")


def _grouped(one: Axis, other: Axis, operation: str) -> bool:
    """Unify a product and a sum: every summand a number of whole groups, which must then stay."""
    whole, parts = (one, other) if one.kind == PRODUCT else (other, one)
    outer, *inner = factors(whole)
    group = product(inner)
    if outer.kind != LEAF or any(part.size % group.size for part in summands(parts)):
        return False
    reason = f"{operation} groups axes that were concatenated"
    lock([outer], reason)
    for part in summands(parts):
        unify(part, product([Axis(part.size // group.size, reason), group]), operation)
    return True


def _aligned(one: Axis, other: Axis, operation: str) -> bool:
    """Unify two products or two sums part by part, dividing leaves where need be."""
    parts = factors if one.kind == PRODUCT else summands
    left, right = parts(one), parts(other)
    while left and right:
        small, large = (left, right) if left[0].size <= right[0].size else (right, left)
        size, whole = small[0].size, large[0]
        if whole.size != size:
            rest = whole.size - size if one.kind == SUM else whole.size // size
            fits = one.kind == SUM or rest * size == whole.size
            if whole.kind != LEAF or not fits:
                return False
            large[:1] = divide(whole, one.kind, (size, rest))
        unify(left[0], right[0], operation)
        # What was unified may have been divided by it: look at the parts anew.
        left, right = (
            [part for axis in left[1:] for part in parts(axis)],
            [part for axis in right[1:] for part in parts(axis)],
        )
    return True


def _take(rest: list[Axis], size: int) -> Axis | None:
    """Take a factor off the front that divides `size`, or a part of it that is `size`."""
    head = rest[0]
    if size % head.size == 0:
        return rest.pop(0)
    if head.size % size or head.kind != LEAF:
        return None
    first, left = divide(head, PRODUCT, (size, head.size // size))
    # Another place of the list may hold the leaf that was just divided.
    rest[:] = [left, *(factor for axis in rest[1:] for factor in factors(axis))]
    return first


def regroup(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Give the axes of a reshaped array, dividing leaves where need be.

    Axes that cannot be divided so are locked, and only they.

    Args:
      axes: of the array before.
      sizes: its new shape, of as many elements, none of them 0.

    Example:
      >>> heads = regroup([Axis(7), Axis(12)], (7, 3, 4))
      >>> [axis.size for axis in heads]
      [7, 3, 4]
    """
    rest = [factor for axis in axes for factor in factors(axis)]
    grouped: list[Axis] = []
    open_sizes = list(sizes)
    while open_sizes:
        size, taken = open_sizes.pop(0), []
        whole = size
        while size > 1:
            part = _take(rest, size)
            if part is None:
                break
            taken.append(part)
            size //= part.size
        if size == 1:
            grouped.append(product(taken))
            continue
        # Lock what makes up these sizes, until both sides have as many elements.
        spent, needed, made = math.prod(_sizes(taken)), whole, [whole]
        while spent != needed:
            if spent < needed:
                taken.append(rest.pop(0))
                spent *= taken[-1].size
            else:
                made.append(open_sizes.pop(0))
                needed *= made[-1]
        lock(taken, "reshape divides it unevenly")
        grouped += [Axis(size, "reshape made it") for size in made]
    return grouped


def cut(axis: Axis, start: int, stop: int) -> Axis | None:
    """Return the part of an axis from start to stop, dividing a leaf where need be.

    Returns:
      The axis of the part, or None where a product would have to be cut.

    Example:
      >>> whole = Axis(6)
      >>> cut(whole, 2, 6).size, [leaf.size for leaf in leaves(whole)]
      (4, [2, 4])
    """
    if start == stop:
        return Axis(0, "it has no unit")
    for edge in (start, stop):
        at = 0
        for part in summands(axis):
            if at < edge < at + part.size:
                if part.kind != LEAF:
                    return None
                divide(part, SUM, (edge - at, at + part.size - edge))
            at += part.size
    at, taken = 0, []
    for part in summands(axis):
        if start <= at < stop:
            taken.append(part)
        at += part.size
    return total(taken)


def units(axis: Axis, leaf: Axis) -> np.ndarray:
    """Return for each index of an axis which unit of a leaf it belongs to, -1 for none.

    Example:
      >>> channels = Axis(2)
      >>> units(product([Axis(3), channels]), channels)
      array([0, 1, 0, 1, 0, 1])
    """
    axis = find(axis)
    if axis is leaf:
        return np.arange(axis.size)
    parts = [units(part, leaf) for part in axis.parts]
    if axis.kind == SUM:
        return np.concatenate(parts)
    found = np.full(axis.size, -1)
    shape = [part.size for part in axis.parts]
    for place, part in enumerate(parts):
        if (part >= 0).any():
            spread = [-1 if at == place else 1 for at in range(len(parts))]
            found = np.broadcast_to(part.reshape(spread), shape).ravel()
    return found


def kept(axis: Axis, keep: Mapping[Axis, np.ndarray]) -> np.ndarray:
    """Return which indices of an axis stay, given which units of leaves stay.

    Args:
      axis: the axis.
      keep: booleans by leaf; a leaf that is absent keeps everything.

    Example:
      >>> channels = Axis(2)
      >>> kept(product([Axis(2), channels]), {channels: np.array([True, False])})
      array([ True, False,  True, False])
    """
    axis = find(axis)
    if axis.kind == LEAF:
        return keep.get(axis, np.ones(axis.size, bool))
    parts = [kept(part, keep) for part in axis.parts]
    if axis.kind == SUM:
        return np.concatenate(parts)
    every = np.ones((), bool)
    for part in parts:
        every = every[..., None] & part
    return every.ravel()
