"""What a peer needs to take part in round_time.py: the work, and the questions and answers. NumPy alone."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np


class Work:
    """The split, initial weights, batch and rate that every contender has, read from the file that the driver wrote.

    `clients`: (images float32[n,784] in 0..1, labels int64[n]) each; `weights`: kernel [784,128], bias, kernel, bias.
    """

    def __init__(self, path: str):
        with np.load(path) as npz:
            images = npz["images"].reshape(-1, 784).astype(np.float32) / 255
            labels = npz["labels"].astype(np.int64)
            parts = np.split(npz["indices"], np.cumsum(npz["sizes"])[:-1])
            self.clients = [(images[part], labels[part]) for part in parts]
            self.test = npz["test_images"].reshape(-1, 784).astype(np.float32) / 255, npz["test_labels"]
            self.weights = [npz[f"weight{number}"] for number in range(4)]
            self.batch, self.rate = int(npz["batch"]), float(npz["rate"])

    def accuracy(self, weights: list[np.ndarray]) -> float:
        kernel1, bias1, kernel2, bias2 = (np.asarray(w) for w in weights)
        images, labels = self.test
        logits = np.maximum(images @ kernel1 + bias1, 0) @ kernel2 + bias2
        return float(np.mean(np.argmax(logits, axis=1) == labels))


@functools.lru_cache
def work_of(path: str) -> Work:
    """Read once in a process, for peers whose clients live in processes of their own."""
    return Work(path)


def weighted_mean(results: list[tuple[int, list[np.ndarray]]]) -> list[np.ndarray]:
    """sum_k (n_k / n) w_k of (n_k, weights) pairs."""
    total = sum(n for n, _ in results)
    return [sum(n / total * w for n, w in zip([n for n, _ in results], layer, strict=True))
            for layer in zip(*[weights for _, weights in results], strict=True)]  # fmt: skip


def serve(contend: Callable[[Work], Iterator[list[np.ndarray]]]) -> None:
    """A round for each line read, its seconds as the answer; at the end the test accuracy."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work = Work(sys.argv[1])
    rounds, weights = contend(work), work.weights
    for line in sys.stdin:
        if line.strip() == "end":
            print(work.accuracy(weights), file=answers, flush=True)
            break
        began = time.perf_counter()
        weights = next(rounds)
        print(time.perf_counter() - began, file=answers, flush=True)
    rounds.close()
