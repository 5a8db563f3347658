"""Distillation losses in float64 NumPy, written from the papers, one example at a time."""

import math

import numpy as np


def softmax(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def kd(student, teacher, temperature):
    pairs = zip(softmax(student, temperature), softmax(teacher, temperature), strict=True)
    return np.array([temperature**2 * kl(t, s) for s, t in pairs])


def reverse_kd(student, teacher, temperature):
    pairs = zip(softmax(student, temperature), softmax(teacher, temperature), strict=True)
    return np.array([temperature**2 * kl(s, t) for s, t in pairs])


def jensen_shannon(student, teacher, beta, temperature):
    out = []
    for q, p in zip(softmax(student, temperature), softmax(teacher, temperature), strict=True):
        m = beta * p + (1 - beta) * q
        out.append(temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m)))
    return np.array(out)


def dkd(student, teacher, labels, alpha, beta, temperature):
    out = []
    for s, t, y in zip(student, teacher, np.asarray(labels), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        target = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        rest_p, rest_q = (np.delete(each, y) / (1 - each[y]) for each in (p, q))
        out.append(temperature**2 * (alpha * target + beta * kl(rest_p, rest_q)))
    return np.array(out)


def dist(student, teacher, beta, gamma, temperature):
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    classes = [np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(q.shape[1])]
    across = np.mean([1 - each for each in classes])
    own = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    return temperature**2 * (beta * np.array(own) + gamma * across)


def attention_transfer(student, teacher, power):
    out = []
    for s, t in zip(np.asarray(student, np.float64), np.asarray(teacher, np.float64), strict=True):
        maps = [(np.abs(f) ** power).sum(-1).ravel() for f in (s, t)]
        first, second = (m / np.linalg.norm(m) for m in maps)
        out.append(np.mean((first - second) ** 2))
    return np.array(out)


def flow(first, second):
    out = []
    for f, g in zip(np.asarray(first, np.float64), np.asarray(second, np.float64), strict=True):
        height, width = f.shape[:2]
        total = np.zeros((f.shape[-1], g.shape[-1]))
        for i in range(height):
            for j in range(width):
                total += np.outer(f[i, j], g[i, j])
        out.append(total / (height * width))
    return np.array(out)


def neuron_selectivity(student, teacher):
    out = []
    for s, t in zip(np.asarray(student, np.float64), np.asarray(teacher, np.float64), strict=True):
        rows = [[c.ravel() / np.linalg.norm(c) for c in np.moveaxis(f, -1, 0)] for f in (s, t)]
        mean = lambda a, b: np.mean([np.dot(x, y) ** 2 for x in a for y in b])  # noqa: E731
        out.append(mean(rows[1], rows[1]) + mean(rows[0], rows[0]) - 2 * mean(*rows))
    return np.array(out)


def vid(student, teacher, raw):
    variance = np.log1p(np.exp(np.asarray(raw, np.float64))) + 1e-5
    losses = 0.5 * (
        np.log(variance)
        + (np.asarray(student, np.float64) - np.asarray(teacher, np.float64)) ** 2 / variance
    )
    return losses.reshape(len(losses), -1).mean(-1)


def mutual(logits, labels, temperature):
    probs, soft = softmax(logits), softmax(logits, temperature)
    out = np.zeros(logits.shape[:-1])
    for k in range(len(logits)):
        for n, y in enumerate(np.asarray(labels)):
            others = [kl(soft[j, n], soft[k, n]) for j in range(len(logits)) if j != k]
            out[k, n] = -math.log(probs[k, n, y]) + temperature**2 * np.mean(others)
    return out
