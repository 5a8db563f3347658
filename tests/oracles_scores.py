"""Pruning scores of the papers in float64 NumPy, written from their equations."""

import numpy as np


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def logistic_example_gradients(weights, inputs, labels):
    """Return dL_n/dW of the cross entropy of softmax(x_n W), example by example."""
    weights, inputs = np.asarray(weights, np.float64), np.asarray(inputs, np.float64)
    gradients = []
    for x, label in zip(inputs, labels, strict=True):
        error = softmax(x @ weights)
        error[label] -= 1
        gradients.append(np.outer(x, error))
    return np.array(gradients)


def logistic_hessian_product(weights, inputs, direction):
    """Return H v for the mean cross entropy: the mean of x (diag(p) - p p^T)(x V)."""
    inputs, total = np.asarray(inputs, np.float64), np.zeros(np.shape(weights))
    for x in inputs:
        p = softmax(x @ np.asarray(weights, np.float64))
        total += np.outer(x, (np.diag(p) - np.outer(p, p)) @ (x @ direction))
    return total / len(inputs)


def synflow(kernels):
    """Return |w| times all paths into it and all paths out of it, for one row of ones."""
    sizes = [np.abs(np.asarray(kernel, np.float64)) for kernel in kernels]
    scores = []
    for index, size in enumerate(sizes):
        before = np.ones(sizes[0].shape[0])
        for other in sizes[:index]:
            before = before @ other
        after = np.ones(sizes[-1].shape[1])
        for other in reversed(sizes[index + 1 :]):
            after = other @ after
        scores.append(size * np.outer(before, after))
    return scores


def synflow_kept(kernels, sparsity, rounds):
    """Return the masks of algorithm 1 for kernels in a row."""
    masks = [np.ones(np.shape(kernel), bool) for kernel in kernels]
    total = sum(mask.size for mask in masks)
    for index in range(1, rounds + 1):
        scores = synflow([k * m for k, m in zip(kernels, masks, strict=True)])
        flat = np.concatenate([s.ravel() for s in scores])
        alive = np.concatenate([m.ravel() for m in masks])
        pruned = round(total * (1 - (1 - sparsity) ** (index / rounds)))
        order = np.argsort(-np.where(alive, flat, -1), kind="stable")
        kept = np.zeros(total, bool)
        kept[order[: total - pruned]] = True
        ends = np.cumsum([mask.size for mask in masks])[:-1]
        masks = [
            part.reshape(np.shape(kernel))
            for part, kernel in zip(np.split(kept, ends), kernels, strict=True)
        ]
    return masks


def lamp(weights):
    """Score each weight, term by term; of equal weights the earlier counts as the larger."""
    flat = np.abs(np.asarray(weights, np.float64)).ravel()
    scores = np.zeros(flat.size)
    for u in range(flat.size):
        larger = [
            v for v in range(flat.size) if flat[v] > flat[u] or (flat[v] == flat[u] and v <= u)
        ]
        total = sum(flat[v] ** 2 for v in larger)
        scores[u] = flat[u] ** 2 / total if total else 0.0
    return scores.reshape(np.shape(weights))


def filters(kernel, axis):
    """Return the filters of a kernel, one flat row each."""
    kernel = np.asarray(kernel, np.float64)
    count = kernel.shape[axis]
    return np.array([np.take(kernel, index, axis).ravel() for index in range(count)])


def distance_sums(kernel, axis):
    """Return for each filter the sum of its distances to the others, pair by pair."""
    rows = filters(kernel, axis)
    return np.array([sum(np.sqrt(((x - y) ** 2).sum()) for y in rows) for x in rows])


def wanda(kernel, rows):
    """Return |W_ij| ||X_j||_2, the kernel's features flattened to rows as X has them."""
    kernel, rows = np.asarray(kernel, np.float64), np.asarray(rows, np.float64)
    norms = np.sqrt((rows**2).sum(0))
    return (np.abs(kernel).reshape(rows.shape[1], -1) * norms[:, None]).reshape(kernel.shape)


def keep_by_output(scores, sparsity):
    """Keep the best of each last-axis column, one by one."""
    flat = np.asarray(scores, np.float64).reshape(-1, np.shape(scores)[-1])
    mask = np.zeros(flat.shape, bool)
    keep = flat.shape[0] - round(flat.shape[0] * sparsity)
    for column in range(flat.shape[1]):
        mask[np.argsort(-flat[:, column], kind="stable")[:keep], column] = True
    return mask.reshape(np.shape(scores))


def inactive(rows):
    """Return APoZ: for each feature the fraction of rows where it is zero."""
    rows = np.asarray(rows)
    return np.array([sum(value == 0 for value in column) / len(column) for column in rows.T])
