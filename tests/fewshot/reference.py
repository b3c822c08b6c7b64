"""Few-shot arithmetic in plain NumPy float64, one episode at a time; imports nothing from the package."""

from __future__ import annotations

import numpy as np


def class_means(support, labels):
    return np.stack([support[labels == label].mean(0) for label in np.unique(labels)])


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def squared_logits(query, prototypes, scale):
    return np.array([[-scale * ((z - c) ** 2).sum() for c in prototypes] for z in query])


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def cosine_logits(query, prototypes, scale):
    return np.array([[scale * cosine(z, c) for c in prototypes] for z in query])


def matching_probabilities(query, support, labels, scale):
    rows = []
    for z in query:
        attention = softmax(np.array([scale * cosine(z, s) for s in support]))
        rows.append([attention[labels == label].sum() for label in np.unique(labels)])
    return np.array(rows)


def film(prototypes, weights, gamma0, beta0, layers):
    """`weights[name]` is (skip, [(matrix, bias)] * 3) of g and b; gives gamma and beta, (layers, dim)."""
    task = prototypes.mean(0)

    def network(skip, chain):
        hidden = task
        for index, (matrix, bias) in enumerate(chain):
            hidden = matrix @ hidden + bias
            if index < len(chain) - 1:
                hidden = np.maximum(hidden, 0)
        return np.maximum(skip @ task + hidden, 0).reshape(layers, -1)

    return (
        1 + gamma0[:, None] * network(*weights["gamma"]),
        beta0[:, None] * network(*weights["beta"]),
    )


def mixup_pair(z_a, z_b, mask, alpha, prototypes, scale):
    def p(z):
        return softmax(squared_logits(z[None], prototypes, scale)[0])

    mixed = mask * z_a + (1 - mask) * z_b
    target = alpha * p(z_a) + (1 - alpha) * p(z_b)
    return float(((p(mixed) - target) ** 2).sum())


def macro_f1(predictions, labels, num_classes):
    scores = []
    for c in range(num_classes):
        hit = ((predictions == c) & (labels == c)).sum()
        wrong = ((predictions == c) != (labels == c)).sum()
        scores.append(2 * hit / (2 * hit + wrong) if 2 * hit + wrong else 0.0)
    return float(np.mean(scores))


def gin(x, edges, layers, post, pool, norm_eps=1e-5):
    """One graph through L GIN layers; `layers[l]` and `post` hold matrices and vectors by name."""
    adjacency = np.zeros((len(x), len(x)))
    for source, target in edges:
        adjacency[target, source] += 1
    hidden, kept = x, [x]
    for layer in layers:
        hidden = (hidden + adjacency @ hidden) @ layer["w1"].T + layer["b1"]
        centred = hidden - hidden.mean(0) * layer["mean_scale"]
        hidden = layer["weight"] * centred / np.sqrt((centred**2).mean(0) + norm_eps) + layer["bias"]
        hidden = np.maximum(hidden, 0) @ layer["w2"].T + layer["b2"]
        kept.append(hidden)
    hidden = np.concatenate(kept, 1) @ post["w1"].T + post["b1"]
    centred = hidden - hidden.mean(1, keepdims=True)
    hidden = post["weight"] * centred / np.sqrt((centred**2).mean(1, keepdims=True) + norm_eps) + post["bias"]
    hidden = np.maximum(hidden, 0) @ post["w2"].T + post["b2"]
    return hidden.mean(0) if pool == "mean" else hidden.sum(0)
