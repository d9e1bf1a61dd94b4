"""Data beside MNIST: scikit-learn's digits, files of one's own, and training images held out.

A data set is four arrays by Keras' names: x_train, x_test uint8[n,28,28] in 0..255; y_train, y_test uint8[n] in 0..C-1.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from harness.fields import UserError

import numpy as np
import sklearn.datasets
import sklearn.model_selection

Arrays = dict[str, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")
IMAGE_SIDE = 28
MAX_CLASSES = 100


def load_digits() -> Arrays:
    """Return scikit-learn's 1,797 digits, 8x8 in 0..16, as 28x28 in 0..255: each pixel three wide, a margin of two."""
    bunch = sklearn.datasets.load_digits()
    images = np.kron(bunch.images, np.ones((3, 3))) * (255 / 16)
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)]).round().astype(np.uint8)
    parts = sklearn.model_selection.train_test_split(
        images, bunch.target.astype(np.uint8), test_size=0.2, random_state=0, stratify=bunch.target
    )
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))


def read_npz(path: Path) -> Arrays:
    """Return the arrays of an .npz with Keras' keys. Raise UserError with what is wrong in the file."""
    source = f"data={str(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as npz:
            absent = sorted(set(KEYS) - set(npz.files))
            if absent:
                raise UserError(f"{source} has no array {absent[0]}; it needs {', '.join(KEYS)}")
            arrays = {key: npz[key] for key in KEYS}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "truncated, or no .npz"
        raise UserError(f"{source} cannot be read ({reason}); give a whole .npz with Keras' keys") from error
    for part in ("train", "test"):
        check_arrays(source, part, arrays["x_" + part], arrays["y_" + part])
    present = np.unique(arrays["y_train"])
    top = int(max(present[-1], arrays["y_test"].max()))
    if len(present) != top + 1:
        lost = min(set(range(top + 1)) - set(present.tolist()))
        raise UserError(f"{source}: no image in y_train has label {lost}; labels must be 0..C-1, each present")
    return {key: np.ascontiguousarray(array, np.uint8) for key, array in arrays.items()}


def check_arrays(source: str, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise UserError unless images are uint8[n,28,28] with n > 0 and labels n whole numbers in 0..MAX_CLASSES-1."""
    if images.dtype != np.uint8:
        raise UserError(f"{source}: x_{part} is {images.dtype}; images must be uint8 in 0..255")
    if images.ndim != 3 or images.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE) or len(images) == 0:
        wanted = f"(n, {IMAGE_SIDE}, {IMAGE_SIDE}), n > 0"
        raise UserError(f"{source}: x_{part} has shape {images.shape}; it must be {wanted}")
    if labels.dtype.kind not in "ui":
        raise UserError(f"{source}: y_{part} is {labels.dtype}; labels must be whole numbers")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{source}: y_{part} has shape {labels.shape}; it must be {images.shape[:1]}, a label an image")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        span = f"{labels.min()}..{labels.max()}"
        raise UserError(f"{source}: y_{part} spans {span}; labels must lie in 0..{MAX_CLASSES - 1}")


def hold_out(images: np.ndarray, labels: np.ndarray, count: int) -> Arrays:
    """Return `count` of the training images as test set, the same for every seed, and the others as training set."""
    if count >= len(labels):
        raise UserError(
            f"holdout={count} leaves none of the {len(labels)} training images; choose 0..{len(labels) - 1}"
        )
    test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [count])
    if len(np.unique(labels[train])) != len(np.unique(labels)):
        raise UserError(f"holdout={count} leaves no training image of some label; choose less")
    return {"x_train": images[train], "y_train": labels[train], "x_test": images[test], "y_test": labels[test]}
