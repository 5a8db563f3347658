"""BERT in float64 NumPy, sentence by sentence and head by head, on a checkpoint's own tensors.

Devlin, Chang, Lee and Toutanova, 2019; attention as in Vaswani et al., "Attention Is All You Need",
2017, equation 1. Tensors have PyTorch's shapes: a dense layer computes x W^T + b.
"""

import math

import numpy as np

_ERF = np.vectorize(math.erf)


def hidden_states(tensors, ids, kinds, heads, epsilon):
    """Encode one sentence without padding: token numbers (length,) to (length, width)."""
    exact = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}

    def dense(x, name):
        return x @ exact[f"{name}.weight"].T + exact[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + epsilon)
        return scaled * exact[f"{name}.weight"] + exact[f"{name}.bias"]

    def gelu(x):
        return x * (1 + _ERF(x / math.sqrt(2))) / 2

    x = exact["embeddings.word_embeddings.weight"][ids]
    x = x + exact["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + exact["embeddings.token_type_embeddings.weight"][kinds], "embeddings.LayerNorm")
    layers = sum(name.endswith("intermediate.dense.weight") for name in exact)
    for number in range(layers):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            np.split(dense(x, f"{layer}.attention.self.{part}"), heads, axis=1)
            for part in ("query", "key", "value")
        )
        seen = []
        for q, k, v in zip(query, key, value, strict=True):
            scores = q @ k.T / math.sqrt(q.shape[1])
            odds = np.exp(scores - scores.max(1, keepdims=True))
            seen.append(odds / odds.sum(1, keepdims=True) @ v)
        attended = dense(np.concatenate(seen, 1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        y = dense(gelu(dense(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + y, f"{layer}.output.LayerNorm")
    return x


def sentence_embedding(hidden):
    """Mean over the tokens, divided by its length."""
    mean = hidden.mean(0)
    return mean / np.linalg.norm(mean)
