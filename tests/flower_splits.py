"""Flower's niid_bench, dataset_preparation.py (adap/flower, commit fdef7afb, Apache 2.0), which
follows NIID-Bench.

Its two splits, with nothing changed but names and what is loaded: what tests/test_partitions.py
compares ours with.
"""

import numpy as np


def flower_dirichlet(targets, num_clients, alpha, seed):
    """Lines 217 to 251."""
    prng = np.random.default_rng(seed)
    num_classes = len(set(targets.tolist()))
    total_samples = len(targets)
    min_samples = 0
    while min_samples < 10:
        idx_clients = [[] for _ in range(num_clients)]
        for k in range(num_classes):
            idx_k = np.where(targets == k)[0]
            prng.shuffle(idx_k)
            proportions = prng.dirichlet(np.repeat(alpha, num_clients))
            proportions = np.array(
                [
                    p * (len(idx_j) < total_samples / num_clients)
                    for p, idx_j in zip(proportions, idx_clients, strict=True)
                ]
            )
            proportions = proportions / proportions.sum()
            proportions = (np.cumsum(proportions) * len(idx_k)).astype(int)[:-1]
            idx_k_split = np.split(idx_k, proportions)
            idx_clients = [
                idx_j + idx.tolist() for idx_j, idx in zip(idx_clients, idx_k_split, strict=True)
            ]
            min_samples = min(len(idx_j) for idx_j in idx_clients)
    return idx_clients


def flower_labels(targets, num_clients, labels_per_client, seed):
    """Lines 278 to 311."""
    prng = np.random.default_rng(seed)
    num_classes = len(set(targets.tolist()))
    times = [0 for _ in range(num_classes)]
    contains = []
    for i in range(num_clients):
        current = [i % num_classes]
        times[i % num_classes] += 1
        j = 1
        while j < labels_per_client:
            index = prng.choice(num_classes, 1)[0]
            if index not in current:
                current.append(index)
                times[index] += 1
                j += 1
        contains.append(current)
    idx_clients = [[] for _ in range(num_clients)]
    for i in range(num_classes):
        idx_k = np.where(targets == i)[0]
        prng.shuffle(idx_k)
        idx_k_split = np.array_split(idx_k, times[i])
        ids = 0
        for j in range(num_clients):
            if i in contains[j]:
                idx_clients[j] += idx_k_split[ids].tolist()
                ids += 1
    return idx_clients
