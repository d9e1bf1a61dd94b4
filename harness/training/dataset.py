"""Data sets: images and labels for training and testing."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.storage.files import briefly, read_bytes

import numpy as np

Arrays = dict[str, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")
OWNERS = "client_train"  # an array of this name says whose each training image is
MNIST_SHAPE = (28, 28, 1)
# Of the SHA-256 of its four arrays, which data/README.md has.
MNIST_SHA256 = "c473ce9de4170e6fe7638543697b7512b19cc4b2c68279feabf4a085461033dd"


def format_shape(shape: tuple[int, ...]) -> str:
    """Return "28x28", or "32x32x3" of images with colours."""
    return "x".join(map(str, shape[:2] if shape[2:] == (1,) else shape))


class Split(NamedTuple):
    """images uint8[N,height,width,channels] in 0..255, labels uint8[N] in 0..C-1; uint16[N] where
    C > 256."""

    images: np.ndarray
    labels: np.ndarray


class OtherImages(NamedTuple):
    """Images and labels, as in Split, on which the global model is also evaluated each round."""

    images: np.ndarray
    labels: np.ndarray
    # bool[N], which are classified correctly -> column -> value; None: their share
    measure: Callable[[np.ndarray], dict[str, float]] | None = None


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `name` stands in every plot, `is_mnist` says that all bytes are
    MNIST's own.

    `owners` says whose each training image is, where the data say; `classes` are the labels as they
    were given, whose places 0..C-1 are ours; `notices` are what the user should know of how the
    data were read.
    """

    name: str
    train: Split
    test: Split
    is_mnist: bool
    digest: str  # SHA-256 of the SHA-256 of the four arrays
    owners: np.ndarray | None = None
    classes: tuple[int | str, ...] = ()
    notices: tuple[str, ...] = ()
    places: np.ndarray | None = None  # int64[N] of the training images in the data, if not all are

    @property
    def num_classes(self) -> int:
        """Labels are 0..C-1, C = 10 for MNIST."""
        return int(self.train.labels.max()) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels), (28, 28, 1) for MNIST."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def chance(self) -> float:
        """The test accuracy of always naming the most frequent label."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))


def make_dataset(name: str, arrays: Arrays, notices: Sequence[str] = ()) -> Dataset:
    """Return the data set of these arrays in our form, identified by the SHA-256 of their bytes."""
    digests = [hashlib.sha256(arrays[key].tobytes()).hexdigest() for key in KEYS]
    if arrays["x_train"].shape[1:] != MNIST_SHAPE:  # the same bytes may be other images
        digests.append(format_shape(arrays["x_train"].shape[1:]))
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    train = Split(arrays["x_train"], arrays["y_train"])
    test = Split(arrays["x_test"], arrays["y_test"])
    classes = tuple(arrays.get("classes", np.arange(int(train.labels.max()) + 1)).tolist())
    return Dataset(
        name,
        train,
        test,
        digest == MNIST_SHA256,
        digest,
        arrays.get(OWNERS),
        classes,
        tuple(notices),
    )


def read_arrays(path: Path) -> Arrays:
    """Return the four arrays of one of our own .npz files. Raises UserError for a damaged one."""
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as npz:
            return {key: npz[key] for key in KEYS}
    except Exception as error:  # NumPy and zipfile raise a dozen kinds on a damaged file
        raise UserError(
            f"{path} cannot be read ({briefly(error)}); restore the committed file"
        ) from error


def check_dataset(dataset: Any) -> None:
    """Raise UserError for something else than a data set, such as arrays."""
    if not isinstance(dataset, Dataset):
        raise UserError(f"dataset={dataset!r:.60} is not a data set; give fl.build_dataset(...)")
