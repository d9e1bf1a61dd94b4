"""What a peer needs to take part in round_time.py and time_to_target.py: the work, and the answers.

NumPy alone.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np


class Work:
    """The split, initial weights, batch and rate that every contender has, read from the file that
    the driver wrote.

    `clients`: (images float32[n,784] in 0..1, labels int64[n]) each, `cohort` of them a round;
    `weights`: kernel and bias of each layer; [height, width, in, out] is a convolution, with ReLU
    and 2 x 2 max-pooling after it. `paddings` has "same" or "valid" for each convolution.
    """

    def __init__(self, path: str):
        with np.load(path) as npz:
            images = npz["images"].reshape(-1, 784).astype(np.float32) / 255
            labels = npz["labels"].astype(np.int64)
            parts = np.split(npz["indices"], np.cumsum(npz["sizes"])[:-1])
            self.clients = [(images[part], labels[part]) for part in parts]
            self.test = (
                npz["test_images"].reshape(-1, 784).astype(np.float32) / 255,
                npz["test_labels"].astype(np.int64),
            )
            self.weights = [
                npz[f"weight{number}"] for number in range(sum("weight" in name for name in npz))
            ]
            self.paddings = npz["paddings"].tolist()
            self.batch = int(npz["batch"])
            self.rate = float(npz["rate"])
            self.epochs = int(npz["epochs"])
            self.cohort = int(npz["cohort"])
            self.seed = int(npz["seed"])

    def cohorts(self) -> Iterator[np.ndarray]:
        """Each round's clients, for peers that have no sampler of their own."""
        draws = np.random.default_rng(self.seed)
        while True:
            yield draws.choice(len(self.clients), self.cohort, replace=False)


@functools.lru_cache
def work_of(path: str) -> Work:
    """Read once in a process, for peers whose clients live in processes of their own."""
    return Work(path)


def weighted_mean(results: list[tuple[int, list[np.ndarray]]]) -> list[np.ndarray]:
    """sum_k (n_k / n) w_k of (n_k, weights) pairs."""
    total = sum(n for n, _ in results)
    return [
        sum(n / total * w for n, w in zip([n for n, _ in results], layer, strict=True))
        for layer in zip(*[weights for _, weights in results], strict=True)
    ]


Weights = list[np.ndarray]


def serve(
    contend: Callable[[Work], Iterator[Weights]],
    build_predict: Callable[[Work], Callable[[Weights, np.ndarray], np.ndarray]],
) -> None:
    """Rounds as the driver wants them: one for each line read, or (--target) all up to an accuracy.

    build_predict(work) -> predict(weights, images float32[n,784]) -> logits [n,classes], by the
    peer's own means.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("--target", type=float)
    parser.add_argument("--rounds", type=int, default=500, help="where the target is not reached")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work = work_of(options.work)
    rounds = contend(work)
    predict = build_predict(work)

    def accuracy(weights: Weights) -> float:
        images, labels = work.test
        return float(np.mean(np.argmax(predict(weights, images), axis=1) == labels))

    if options.target is not None:
        for number in range(1, options.rounds + 1):
            reached = accuracy(next(rounds))
            print(number, reached, file=answers, flush=True)
            if reached >= options.target:
                break
        os._exit(0)  # engines with threads of their own don't all end
    weights = work.weights
    for line in sys.stdin:
        if line.strip() == "end":
            print(accuracy(weights), file=answers, flush=True)
            break
        began = time.perf_counter()
        weights = next(rounds)
        print(time.perf_counter() - began, file=answers, flush=True)
    rounds.close()
