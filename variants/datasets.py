"""Data sets: MNIST, scikit-learn's digits, files of one's own in the forms that people have, and
images held out.

A data set is read as four arrays by Keras' names, x_train, y_train, x_test, y_test, and becomes a
Dataset: images uint8[n,28,28] in 0..255, labels uint8[n] in 0..C-1. What would lose information is
refused.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.fields import UserError
from harness.files import expand_path, read_bytes
from variants import idx

import numpy as np
import sklearn.datasets
import sklearn.model_selection

Arrays = dict[str, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")
OTHER_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("arr_0", "arr_1", "arr_2", "arr_3"),
)
OWNERS = "client_train"  # an array of this name says whose each training image is
IMAGE_SIDE = 28
MAX_CLASSES = 100
DARKEST = 32  # images in fractions whose highest is below it are in no usual scale
# Of the SHA-256 of its four arrays, which data/README.md has.
MNIST_SHA256 = "c473ce9de4170e6fe7638543697b7512b19cc4b2c68279feabf4a085461033dd"


class Split(NamedTuple):
    """images uint8[N,28,28] in 0..255, labels uint8[N] in 0..C-1."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `name` stands in every plot, `original` says that all bytes are
    MNIST's own.

    `owners` says whose each training image is, where the data do; `classes` are the labels as they
    were given, whose places 0..C-1 are ours; `remarks` are what the user should know of how the
    data were read.
    """

    name: str
    train: Split
    test: Split
    original: bool
    digest: str  # SHA-256 of the SHA-256 of the four arrays
    owners: np.ndarray | None = None
    classes: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Labels are 0..C-1, C = 10 for MNIST."""
        return int(self.train.labels.max()) + 1

    @property
    def chance(self) -> float:
        """The test accuracy of always naming the most frequent label."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))


def make_dataset(name: str, arrays: Arrays, remarks: Sequence[str] = ()) -> Dataset:
    """Return the data set of these arrays, identified by the SHA-256 of their bytes."""
    digests = [hashlib.sha256(arrays[key].tobytes()).hexdigest() for key in KEYS]
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
        tuple(remarks),
    )


def load_digits() -> Dataset:
    """Return scikit-learn's 1,797 digits, 8x8 in 0..16, as 28x28 in 0..255: each pixel three wide,
    a margin of two."""
    bunch = sklearn.datasets.load_digits()
    images = np.kron(bunch.images, np.ones((3, 3))) * (255 / 16)
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)]).round().astype(np.uint8)
    parts = sklearn.model_selection.train_test_split(
        images, bunch.target.astype(np.uint8), test_size=0.2, random_state=0, stratify=bunch.target
    )
    arrays = dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))
    return make_dataset("scikit-learn digits (not MNIST)", arrays)


def load_files(file: str, name: str, transpose: bool) -> Dataset:
    """Return the data set in an .npz or in a folder of IDX files, called `name` if that is given.

    With `transpose` the images' rows and columns change places, as EMNIST's files need it.
    """
    path = expand_path(file)
    source = f"data={str(path)!r:.200}"
    raw = idx.read_set(path, source) if idx.names_set(path) else read_npz(path)
    arrays, remarks = to_canonical_arrays(raw, source)
    if transpose:
        arrays |= {
            key: np.ascontiguousarray(arrays[key].transpose(0, 2, 1))
            for key in ("x_train", "x_test")
        }
    dataset = make_dataset(
        name or "not the original MNIST", arrays, [*remarks, *brightness_remarks(arrays["x_train"])]
    )
    return make_dataset("MNIST", arrays) if dataset.original and not name else dataset


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Return the data with `count` of the training images in the test set's place, the same for
    every seed."""
    images, labels = dataset.train
    if count >= len(labels):
        raise UserError(
            f"holdout={count} leaves none of the {len(labels)} training images; choose less"
        )
    test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [count])
    if len(np.unique(labels[train])) != len(np.unique(labels)):
        raise UserError(f"holdout={count} leaves no training image of some label; choose less")
    arrays = {
        "x_train": images[train],
        "y_train": labels[train],
        "x_test": images[test],
        "y_test": labels[test],
    }
    arrays["classes"] = np.array(dataset.classes)
    if dataset.owners is not None:
        arrays[OWNERS] = dataset.owners[train]
    name = f"{dataset.name}, evaluated on {count:,} training images held out"
    return make_dataset(name, arrays, dataset.remarks)


def read_npz(path: Path) -> Arrays:
    """Return the arrays of an .npz by Keras' names. Raises UserError if it cannot be read."""
    source = f"data={str(path)!r:.200}"
    try:
        content = io.BytesIO(read_bytes(path))
        size = sum(member.file_size for member in zipfile.ZipFile(content).infolist())
        if size > idx.MOST_BYTES:
            raise OSError(0, f"{size / 1e9:,.0f} GB, of which at most 8 can be used")
        with np.load(content, allow_pickle=False) as npz:
            members = {name: npz[name] for name in npz.files}
    except Exception as error:  # NumPy and zipfile raise a dozen kinds on a damaged file
        reason = getattr(error, "strerror", None) or "truncated, or no .npz"
        raise UserError(
            f"{source} cannot be read ({reason}); give a whole .npz with Keras' keys, or a folder "
            "of IDX files; a run is resumed with --data NEW"
        ) from error
    # A member that is no .npy comes as bytes.
    stored = {name: array for name, array in members.items() if isinstance(array, np.ndarray)}
    for names in (KEYS, *OTHER_KEYS):
        if set(names) <= stored.keys():
            arrays = {key: stored[name] for key, name in zip(KEYS, names, strict=True)}
            return arrays | ({OWNERS: stored[OWNERS]} if OWNERS in stored else {})
    absent = sorted(set(KEYS) - stored.keys())
    raise UserError(f"{source} has no array {absent[0]}; it needs {', '.join(KEYS)}")


def to_canonical_arrays(raw: Arrays, source: str) -> tuple[Arrays, list[str]]:
    """Return the arrays in our form, and what was done to them.

    Raises UserError if they hold something else.
    """
    remarks: list[str] = []
    images = {
        part: to_images(raw[f"x_{part}"], f"{source}: x_{part}") for part in ("train", "test")
    }
    labels = {
        part: to_labels(raw[f"y_{part}"], f"{source}: y_{part}") for part in ("train", "test")
    }
    for part in ("train", "test"):
        if labels[part].shape != images[part].shape[:1]:
            wanted = f"{images[part].shape[:1]}, a label an image"
            raise UserError(
                f"{source}: y_{part} has shape {raw[f'y_{part}'].shape}; it must be {wanted}"
            )
    scales = {part: 255 if array.max() <= 1 else 1 for part, array in images.items()}
    if scales["train"] != scales["test"]:
        ranges = [f"x_{part} in 0..{array.max():g}" for part, array in images.items()]
        raise UserError(f"{source}: {' but '.join(ranges)}; give both in one scale")
    if scales["train"] == 255:
        remarks.append(f"{source}: images in 0..1 are taken × 255")
    exact = {part: array * scales[part] for part, array in images.items()}
    images = {part: np.round(array).astype(np.uint8) for part, array in exact.items()}
    for part, array in exact.items():
        if np.abs(array - images[part]).max() > 0.01:
            if array.max() < DARKEST:
                raise UserError(
                    f"{source}: x_{part} is {array.dtype} in 0..{array.max():g}, which rounding to "
                    "grey levels would spoil; scale it to 0..1 or 0..255"
                )
            remarks.append(f"{source}: x_{part} is rounded to 256 grey levels")
    classes = np.unique(labels["train"])
    strange = np.setdiff1d(labels["test"], classes)
    if len(strange):
        raise UserError(
            f"{source}: no image in y_train has label {strange[0]}, as y_test has; give data of "
            "one kind"
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{source}: {len(classes)} labels are too many; choose data of at most {MAX_CLASSES}"
        )
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        span = f"{classes[0]}..{classes[-1]}"
        remarks.append(
            f"{source}: the {len(classes)} labels in {span} are trained on as 0..{len(classes) - 1}"
        )
    leaked = count_shared(images["train"], images["test"])
    if leaked:
        remarks.append(
            f"{source}: {leaked:,} of the {len(images['test']):,} test images are training images "
            "too; the test accuracy says too much of new ones"
        )
    arrays = {f"x_{part}": np.ascontiguousarray(array) for part, array in images.items()} | {
        "classes": classes
    }
    arrays |= {
        f"y_{part}": np.searchsorted(classes, array).astype(np.uint8)
        for part, array in labels.items()
    }
    if OWNERS in raw:
        if raw[OWNERS].shape != arrays["y_train"].shape or raw[OWNERS].dtype.kind not in "uiUS":
            wanted = f"{arrays['y_train'].shape}, whose each training image is"
            raise UserError(
                f"{source}: {OWNERS} is {raw[OWNERS].dtype}{raw[OWNERS].shape}; it must be {wanted}"
            )
        arrays[OWNERS] = raw[OWNERS]
    return arrays, remarks


def to_images(array: np.ndarray, source: str) -> np.ndarray:
    """Return images of any usual shape as [n,28,28], n > 0, of their own type."""
    side = IMAGE_SIDE
    shapes = {(side, side), (side, side, 1), (1, side, side), (side * side,)}
    if array.dtype.kind not in "buif":
        raise UserError(f"{source} is {array.dtype}; images must be numbers")
    if array.shape[1:] not in shapes or len(array) == 0:
        raise UserError(
            f"{source} has shape {array.shape}; it must be (n, {side}, {side}), n > 0, or flat"
        )
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise UserError(
            f"{source} is {array.dtype} in {array.min():g}..{array.max():g}; images must lie in "
            "0..255"
        )
    is_bool = array.dtype.kind == "b"
    return (array.astype(np.uint8) if is_bool else array).reshape(-1, side, side)


def count_shared(train: np.ndarray, test: np.ndarray) -> int:
    """Return how many of the test images uint8[n,28,28] are training images, pixel for pixel."""
    known = {hash(image.tobytes()) for image in train}
    return sum(hash(image.tobytes()) in known for image in test)


def to_labels(array: np.ndarray, source: str) -> np.ndarray:
    """Return labels of shape (n,), (n,1) or one-hot (n,C) as int64[n]."""
    if array.dtype.kind not in "uifb" or (
        array.dtype.kind == "f" and not (np.round(array) == array).all()
    ):
        raise UserError(f"{source} is {array.dtype}; labels must be whole numbers")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if (
        array.ndim == 2
        and array.shape[1] > 1
        and np.isin(array, (0, 1)).all()
        and (array.sum(axis=1) == 1).all()
    ):
        array = array.argmax(axis=1)
    if array.ndim == 1 and len(array) and np.abs(array.astype(np.float64)).max() > 2**31:
        raise UserError(
            f"{source} spans {array.min()}..{array.max()}; labels must be small whole numbers"
        )
    return array.astype(np.int64)


def brightness_remarks(images: np.ndarray) -> list[str]:
    """Return what is unusual about training images uint8[n,28,28]."""
    mean = images.mean()
    if mean > 127:
        return [
            f"the images are bright (mean {mean:.0f} of 255), as dark strokes on white are; if the "
            "run stays at chance invert them or try --client-lr 0.01"
        ]
    return []


ROWS = {"digits": load_digits}
