"""Distillation of transformers in float64 NumPy: the papers' formulas, sequence by sequence.

Each function takes `real`, booleans (batch, tokens), and cuts padding off before it computes.
"""

import numpy as np

from tests.oracles import log_softmax


def by_sequence(one, student, teacher, real):
    """Apply a loss of one unpadded sequence to each of a batch."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    return np.array([one(s, t, r) for s, t, r in zip(student, teacher, real, strict=True)])


def hidden_state_loss(student, teacher, real):
    """TinyBERT: L_hidn = MSE(H_s, H_t)."""
    return by_sequence(lambda s, t, r: np.square(s[r] - t[r]).mean(), student, teacher, real)


def normalized_state_loss(student, teacher, real):
    """PKD: || h_s / |h_s| - h_t / |h_t| ||^2, mean over tokens."""

    def one(s, t, r):
        total = 0.0
        for a, b in zip(s[r], t[r], strict=True):
            total += np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2
        return total / r.sum()

    return by_sequence(one, student, teacher, real)


def cosine_loss(student, teacher, real):
    """DistilBERT: 1 - cos(h_s, h_t), mean over tokens."""

    def one(s, t, r):
        total = 0.0
        for a, b in zip(s[r], t[r], strict=True):
            total += 1 - a @ b / np.sqrt((a @ a) * (b @ b))
        return total / r.sum()

    return by_sequence(one, student, teacher, real)


def attention_score_loss(student, teacher, real):
    """TinyBERT: L_attn = 1/h sum_i MSE(A_i^S, A_i^T)."""

    def one(s, t, r):
        heads = [np.square(a[r][:, r] - b[r][:, r]).mean() for a, b in zip(s, t, strict=True)]
        return np.mean(heads)

    return by_sequence(one, student, teacher, real)


def attention_distribution_loss(student, teacher, real):
    """MiniLM: L_AT = 1/(h |x|) sum_a sum_t KL(A^T_{a,t} || A^S_{a,t}), zero terms left out."""

    def one(s, t, r):
        total = 0.0
        for a, b in zip(s, t, strict=True):
            for p, q in zip(b[r][:, r], a[r][:, r], strict=True):
                p, q = p / p.sum(), q / q.sum()
                total += sum(p[k] * np.log(p[k] / q[k]) for k in range(len(p)) if p[k] > 0)
        return total / (len(s) * r.sum())

    return by_sequence(one, student, teacher, real)


def relation_loss(student, teacher, heads, real):
    """MiniLM: L_VR = 1/(h |x|) sum KL(VR^T || VR^S), VR = softmax(V V^T / sqrt(d))."""

    def relations(vectors, head):
        width = vectors.shape[1] // heads
        part = vectors[:, head * width : (head + 1) * width]
        return log_softmax(part @ part.T / np.sqrt(width))

    def one(s, t, r):
        total = 0.0
        for head in range(heads):
            log_s, log_t = relations(s[r], head), relations(t[r], head)
            total += (np.exp(log_t) * (log_t - log_s)).sum()
        return total / (heads * r.sum())

    return by_sequence(one, student, teacher, real)


def word_level_loss(student, teacher, temperature, real):
    """Kim and Rush's cross-entropy less its least value, with Hinton's T^2, mean over words."""

    def one(s, t, r):
        log_s, log_t = log_softmax(s[r] / temperature), log_softmax(t[r] / temperature)
        cross, least = -(np.exp(log_t) * log_s).sum(-1), -(np.exp(log_t) * log_t).sum(-1)
        return temperature**2 * (cross - least).mean()

    return by_sequence(one, student, teacher, real)


def masked_word_loss(student, labels, real):
    """BERT's loss: -log p(word), mean over the masked words."""
    losses = []
    for s, y, r in zip(np.asarray(student, np.float64), np.asarray(labels), real, strict=True):
        log_probs = log_softmax(s)
        words = [-log_probs[i, y[i]] for i in range(len(y)) if r[i] and y[i] >= 0]
        losses.append(np.mean(words) if words else 0.0)
    return np.array(losses)


def greedy(logits_of_prefix, prompt, length):
    """Append the likeliest token `length` times, the model seeing nothing but the prefix."""
    tokens = np.asarray(prompt)
    for _ in range(length):
        best = np.asarray(logits_of_prefix(tokens))[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, best[:, None].astype(tokens.dtype)], axis=1)
    return tokens
