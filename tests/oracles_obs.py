"""The papers' second-order pruning in float64 NumPy, for one matrix of shape (inputs, outputs)."""

import itertools

import numpy as np


def damped(gram, damping):
    """Return gram with `damping` times the mean of its diagonal added, 1 for dead inputs."""
    gram = np.array(gram, np.float64)
    diagonal = np.diag(gram) + damping * np.mean(np.diag(gram))
    np.fill_diagonal(gram, np.where(diagonal > 0, diagonal, 1.0))
    return gram


def smallest(scores, count):
    """Mark the `count` smallest; of equal ones those of the higher index in (inputs, outputs)."""
    order = np.argsort(-scores, axis=None, kind="stable")
    marked = np.zeros(scores.size, bool)
    marked[order[scores.size - count :]] = True
    return marked.reshape(scores.shape)


def sparse_gpt(weights, gram, sparsity, damping, block, round_row=None, offset=0):
    """Frantar and Alistarh 2023, algorithm 1, lazy updates and all, in the paper's layout.

    `sparsity` is a fraction or (n, m). `round_row(row, values)` rounds what is kept, as the paper's
    section on joint quantization says. `offset` is the number of weights of the groups before.
    """
    remaining = np.array(weights, np.float64).T  # outputs by inputs
    outputs, inputs = remaining.shape
    dead = np.diag(np.asarray(gram)) == 0
    factor = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    mask = np.ones((outputs, inputs), bool)
    pruned = np.zeros_like(remaining)
    nm = isinstance(sparsity, tuple)

    def losses(first, last):
        values = remaining[:, first:last] ** 2 / np.diag(factor)[first:last] ** 2
        return np.where(dead[first:last], 0.0, values)

    def prune_smallest(first, last):
        """Take as many as bring what was pruned so far to its share."""
        if nm:
            n, m = sparsity
            for row in losses(first, last), mask[:, first:last]:
                assert row.shape[1] == m
            for output, row in enumerate(losses(first, last)):
                mask[output, first:last] = ~smallest(row, m - n)
        else:
            goal = round((offset + last * outputs) * sparsity)
            count = goal - round((offset + first * outputs) * sparsity)
            mask[:, first:last] = ~smallest(losses(first, last).T, count).T

    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        errors = np.zeros((outputs, last - first))
        if not nm:
            prune_smallest(first, last)
        for column in range(first, last):
            if nm and column % sparsity[1] == 0:
                prune_smallest(column, column + sparsity[1])
            kept = remaining[:, column]
            if round_row is not None:
                kept = round_row(column, kept)
            pruned[:, column] = np.where(mask[:, column], kept, 0.0)
            error = (remaining[:, column] - pruned[:, column]) / factor[column, column]
            errors[:, column - first] = error
            remaining[:, column:last] -= np.outer(error, factor[column, column:last])
        remaining[:, last:] -= errors @ factor[first:last, last:]
    return pruned.T, mask.T


def least_squares(column, mask, gram):
    """Return the kept weights of one output that reproduce its outputs best."""
    gram, column = np.asarray(gram, np.float64), np.asarray(column, np.float64)
    solved = np.zeros_like(column)
    if mask.any():
        solved[mask] = np.linalg.solve(gram[mask][:, mask], gram[mask] @ column)
    return solved


def error_of(column, solved, gram):
    delta = np.asarray(column, np.float64) - solved
    return float(delta @ np.asarray(gram, np.float64) @ delta)


def exact_obs(column, gram, steps, pattern=None):
    """Frantar, Singh, Alistarh 2022, algorithm 1: the weights in order of removal, their losses.

    With a pattern (n, m) a group of m inputs that has only n left loses none.
    """
    column, inverse = np.array(column, np.float64), np.linalg.inv(np.asarray(gram, np.float64))
    left = np.ones(len(column), bool)
    order, losses = [], []
    for _ in range(steps):
        allowed = left.copy()
        if pattern is not None:
            n, m = pattern
            allowed &= np.repeat(left.reshape(-1, m).sum(1) > n, m)
        scores = np.full(len(column), np.inf)
        scores[allowed] = column[allowed] ** 2 / np.diag(inverse)[allowed]
        at = int(np.argmin(scores))
        order.append(at)
        losses.append(scores[at])
        column = column - inverse[:, at] * column[at] / inverse[at, at]
        inverse = inverse - np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        left[at] = False
        column[at] = 0
    return order, np.array(losses)


def by_queue(traces, count):
    """Algorithm 2: how many weights each output loses if the cheapest next one goes each time."""
    taken = [0] * len(traces)
    for _ in range(count):
        heads = [
            trace[taken[i]] if taken[i] < len(trace) else np.inf for i, trace in enumerate(traces)
        ]
        taken[int(np.argmin(heads))] += 1
    return taken


def best_single_removal(column, gram, left):
    """Try every removal with the others solved anew; return the best and its error."""
    candidates = []
    for at in np.flatnonzero(left):
        mask = left.copy()
        mask[at] = False
        candidates.append((error_of(column, least_squares(column, mask, gram), gram), int(at)))
    return min(candidates)


def best_subset(column, gram, keep):
    """Return the least error that any `keep` weights reach."""
    return min(
        error_of(column, least_squares(column, np.isin(np.arange(len(column)), kept), gram), gram)
        for kept in itertools.combinations(range(len(column)), keep)
    )
