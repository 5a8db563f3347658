"""Losses on relations in float64 NumPy, written from the papers without looking at the library."""

import numpy as np


def _rows(features):
    features = np.asarray(features, np.float64)
    return [row.ravel() for row in features]


def _cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def _huber(x):
    """Return Park et al., equation 7: quadratic up to one, then linear."""
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def _relative_distances(features):
    """Return equation 5 of Park et al. for all pairs; mu is equation 6, over distinct pairs."""
    rows = _rows(features)
    places = range(len(rows))
    distance = {
        (i, j): float(np.linalg.norm(rows[i] - rows[j])) for i in places for j in places if i != j
    }
    mu = sum(distance.values()) / len(distance)
    return {pair: value / mu for pair, value in distance.items()}


def rkd_distance(student, teacher):
    student, teacher = _relative_distances(student), _relative_distances(teacher)
    batch = 1 + max(i for i, _ in student)
    return np.array(
        [
            np.mean([_huber(student[i, j] - teacher[i, j]) for j in range(batch) if j != i])
            for i in range(batch)
        ]
    )


def rkd_angle(student, teacher):
    student, teacher = _rows(student), _rows(teacher)
    batch = len(student)

    def cosine(rows, i, j, k):
        return _cosine(rows[i] - rows[j], rows[k] - rows[j])

    return np.array(
        [
            np.mean(
                [
                    _huber(cosine(student, i, j, k) - cosine(teacher, i, j, k))
                    for i in range(batch)
                    for k in range(batch)
                    if len({i, j, k}) == 3
                ]
            )
            for j in range(batch)
        ]
    )


def similarity_preserving(student, teacher):
    """Return the rows of Tung and Mori's equation 4, b times too large each."""
    grams = []
    for rows in (_rows(student), _rows(teacher)):
        gram = np.array([[a @ b for b in rows] for a in rows])
        grams.append(np.array([row / np.sqrt((row**2).sum()) for row in gram]))
    batch = len(grams[0])
    return ((grams[1] - grams[0]) ** 2).sum(1) / batch


def gaussian(features, gamma):
    rows = [row / np.linalg.norm(row) for row in _rows(features)]
    return np.array([[np.exp(-gamma * ((a - b) ** 2).sum()) for b in rows] for a in rows])


def gaussian_by_taylor(features, gamma, order):
    """Return the series of Peng et al., the terms up to the given order."""
    rows = [row / np.linalg.norm(row) for row in _rows(features)]
    total = np.zeros((len(rows), len(rows)))
    factor = np.exp(-2 * gamma)
    for power in range(order + 1):
        total += factor * np.array([[(a @ b) ** power for b in rows] for a in rows])
        factor *= 2 * gamma / (power + 1)
    return total


def correlation_congruence(student, teacher, gamma):
    difference = gaussian(student, gamma) - gaussian(teacher, gamma)
    return (difference**2).sum(1) / len(difference)


def _neighbours(features):
    rows = _rows(features)
    places = range(len(rows))
    kernel = {(i, j): (_cosine(rows[i], rows[j]) + 1) / 2 for i in places for j in places}
    return {
        (i, j): kernel[i, j] / sum(kernel[i, k] for k in places if k != i)
        for i in places
        for j in places
        if i != j
    }


def pkt(student, teacher):
    student, teacher = _neighbours(student), _neighbours(teacher)
    losses = np.zeros(1 + max(i for i, _ in student))
    for (i, j), p in teacher.items():
        losses[i] += p * np.log(p / student[i, j])
    return losses


def _unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def contrastive_normalizer(embeddings, bank, indices, negatives, temperature):
    """Return the authors' Z: examples times the mean of the exponentials of a batch."""
    embeddings, bank = _unit(embeddings), np.asarray(bank, np.float64)
    values = [
        np.exp(embedding @ bank[place] / temperature)
        for embedding, own, others in zip(embeddings, indices, negatives, strict=True)
        for place in (own, *others)
    ]
    return len(bank) * np.mean(values)


def contrastive_direction(embeddings, bank, normalizer, indices, negatives, temperature):
    """Return minus the log likelihood of h for one embedding against the other's bank."""
    embeddings, bank = _unit(embeddings), np.asarray(bank, np.float64)
    odds = np.shape(negatives)[1] / len(bank)

    def h(embedding, place):
        p = np.exp(embedding @ bank[place] / temperature) / normalizer
        return p / (p + odds)

    return np.array(
        [
            -np.log(h(embedding, own)) - sum(np.log(1 - h(embedding, other)) for other in others)
            for embedding, own, others in zip(embeddings, indices, negatives, strict=True)
        ]
    )


def contrastive_bank(bank, embeddings, indices, momentum):
    bank = np.array(bank, np.float64)
    for embedding, own in zip(_unit(embeddings), indices, strict=True):
        row = momentum * bank[own] + (1 - momentum) * embedding
        bank[own] = row / np.linalg.norm(row)
    return bank


def central_differences(function, x, step=1e-6):
    """Return the gradient of a float64 function of one array."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[place] += step
        behind[place] -= step
        gradient[place] = (function(ahead) - function(behind)) / (2 * step)
    return gradient
