"""Seconds a round and memory of data of FEMNIST's shape: 62 labels, 3,500 owners, 800,000 images.

    python benchmarks/natural.py

The images are a stand-in made here: MNIST's, shifted by a draw of each owner, with noise.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from results import ROOT, mean_sd

OWNERS = 3500
LABELS = 62
TESTS = 40_000
FLAGS = (
    "--partition natural --model cnn --clients-per-round 10 --local-epochs 1 --client-lr 0.05 "
    "--rounds 5 --figures none --name natural"
)


def make(file: Path) -> int:
    """Write the stand-in; return its number of training images."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(np.log(210), 0.45, OWNERS).round().astype(int), 20, 500)
    total = int(sizes.sum())
    mnist = np.load(ROOT / "data" / "mnist.npz")["x_train"]
    prototypes = np.maximum(mnist[:LABELS], np.rot90(mnist[LABELS : 2 * LABELS], axes=(1, 2)))
    labels = rng.integers(0, LABELS, total).astype(np.uint8)
    shifts = rng.integers(-3, 4, (OWNERS, 2))
    images = np.empty((total, 28, 28), np.uint8)
    start = 0
    for owner, size in enumerate(sizes):
        own = prototypes[labels[start : start + size]].astype(np.int16)
        noisy = np.roll(own, tuple(shifts[owner]), (1, 2)) + rng.integers(-40, 40, own.shape)
        images[start : start + size] = noisy.clip(0, 255)
        start += size
    test_labels = rng.integers(0, LABELS, TESTS).astype(np.uint8)
    tests = prototypes[test_labels].astype(np.int16) + rng.integers(-40, 40, (TESTS, 28, 28))
    owners = np.repeat(np.arange(OWNERS), sizes).astype(np.uint16)
    np.savez(
        file,
        x_train=images,
        y_train=labels,
        x_test=tests.clip(0, 255).astype(np.uint8),
        y_test=test_labels,
        client_train=owners,
    )
    return total


def main() -> None:
    """Print seconds a round and the memory of the largest process."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        total = make(folder / "natural.npz")
        words = [sys.executable, str(ROOT / "federated_learning.py"), "--data", "natural.npz"]
        subprocess.run([*words, *FLAGS.split()], cwd=folder, check=True)
        rounds = json.loads((folder / "runs" / "natural" / "metrics.json").read_text())["rounds"]
    seconds = [record["seconds"] for record in rounds[1:]]  # the first one starts the worker
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{total:,} images, {OWNERS:,} owners: {mean_sd(seconds, 1)} s a round, {largest:.1f} GiB "
        "in the largest process"
    )


if __name__ == "__main__":
    main()
