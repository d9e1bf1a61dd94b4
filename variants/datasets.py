"""Data sets: MNIST, scikit-learn's digits, custom files, and held-out images.

A data set is read as four arrays by Keras' names; canonical.py brings them into one form.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.storage.files import briefly, expand_path, one_line, read_bytes, to_utf_8
from harness.training.dataset import KEYS, OWNERS, Arrays, Dataset, make_dataset
from variants import idx, pictures, tables
from variants.canonical import brightness_notices, to_canonical_arrays
from variants.choices import DATASETS

import numpy as np
import sklearn.datasets
import sklearn.model_selection

OTHER_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("arr_0", "arr_1", "arr_2", "arr_3"),
    ("train_images", "train_labels"),  # without a test set
    ("x", "y"),
)
VALIDATION_KEYS = (("x_val", "y_val"), ("val_images", "val_labels"))


def check_given(name: Any, arrays: dict[str, Any]) -> None:
    """Raise UserError unless the name is a text and the rest are arrays."""
    if not isinstance(name, str):
        raise UserError(f"name={name!r:.60} is not a text; give one, such as 'my images'")
    if not one_line(name).strip():
        raise UserError(f"name={name!r:.60} is empty; give one, such as 'my images'")
    for key, given in arrays.items():
        try:
            array = None if given is None else np.asarray(given)
        except Exception as error:  # ragged lists; an object that fails to turn into an array
            raise UserError(f"{key} is not an array ({briefly(error)}); give one") from error
        if array is None:
            raise UserError(f"{key}=None is not an array; give one (a test set is needed, too)")


def build_dataset(
    x_train: Any, y_train: Any, x_test: Any, y_test: Any, name: str = "custom arrays"
) -> Dataset:
    """Build a data set from arrays, in any form that --data takes, for `run(dataset=...)`.

    Images are [n,H,W] or [n,H,W,channels] in 0..1 or 0..255; labels are integers [n]. Raises
    UserError for others.
    """
    check_given(name, {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test})
    given = dict(zip(KEYS, map(np.asarray, (x_train, y_train, x_test, y_test)), strict=True))
    arrays, notices = to_canonical_arrays(given, name)
    return make_dataset(one_line(name), arrays, [*notices, *brightness_notices(arrays["x_train"])])


def load_digits() -> Dataset:
    """Return scikit-learn's 1,797 digits, 8x8 in 0..16, as 28x28 in 0..255: each pixel three wide,
    a margin of two."""
    bunch = sklearn.datasets.load_digits()
    enlarged = np.kron(bunch.images, np.ones((3, 3))) * (255 / 16)
    images = np.pad(enlarged, [(0, 0), (2, 2), (2, 2)]).round().astype(np.uint8)[..., np.newaxis]
    parts = sklearn.model_selection.train_test_split(
        images, bunch.target.astype(np.uint8), test_size=0.2, random_state=0, stratify=bunch.target
    )
    arrays = dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))
    return make_dataset(DATASETS["digits"].title, arrays)


def read_any(
    path: Path, source: str, size: tuple[int, int] | None, test_share: float
) -> tuple[Arrays, list[str]]:
    """Return the arrays of data in any form that --data takes, and what the user should know."""
    is_folder = os.path.isdir(path)  # of a name that is too long it is False
    if is_folder and pictures.find_parts(pictures.descend(path)) and pictures.has_pictures(path):
        return pictures.read_folder(path, source, size, test_share)
    for ending, read in (
        (".csv", tables.read_csv),
        (".parquet", partial(tables.read_parquet, size=size)),
    ):
        files = {"train": [path]} if path.suffix.lower() == ending else {}
        if is_folder:
            files = tables.find_tables(path, ending)
        if "train" in files:
            if ending == ".csv":
                check_no_size(source, size)
            raw = tables.read_tables(files, read)
            return pictures.with_test_set(raw, source, test_share), []
    if is_folder and not idx.find_sets(path, source):
        if any(path.glob("*.npz")):
            check_no_size(source, size)
            raw = tables.read_client_files(path, source, read_npz)
            return pictures.with_test_set(raw, source, test_share), []
        if pictures.has_pictures(path):
            return pictures.read_folder(path, source, size, test_share)
    check_no_size(source, size)
    raw = idx.read_set(path, source) if idx.names_set(path) else read_npz(path)
    return pictures.with_test_set(raw, source, test_share), []


def check_no_size(source: str, size: tuple[int, int] | None) -> None:
    """Raise UserError for a size of images that are arrays."""
    if size:
        raise UserError(
            f"image_size={size[0]}x{size[1]} is for pictures, but {source} has arrays; drop it"
        )


def load_files(
    file: str,
    name: str,
    transpose: bool,
    validation: bool,
    size: tuple[int, int] | None = None,
    test_share: float = 0.0,
) -> Dataset:
    """Return the data set in a file or folder of any form, called `name` if that is given.

    With `transpose` the images' rows and columns change places, as EMNIST's files need it; with
    `validation` the file's validation images take the test set's place. Pictures get this `size`
    (height, width) if it is given; `test_share` of the training images are the test set of data
    without one.
    """
    path = expand_path(file)
    source = f"data={str(path)!r:.200}"
    raw, read_notices = read_any(path, source, size, test_share)
    is_used = validation or raw.get("x_val") is raw["x_test"]
    num_unused = 0 if is_used else len(raw.get("x_val", ()))
    if validation:
        if "x_val" not in raw:
            raise UserError(
                f"{source} has no validation images (val_images or x_val); drop --validation, or "
                "hold out some of the training images with --holdout"
            )
        raw |= {"x_test": raw["x_val"], "y_test": raw["y_val"]}
    arrays, notices = to_canonical_arrays(raw, source)
    notices = [*read_notices, *notices]
    if num_unused:
        notices.append(
            f"{source}: its {num_unused:,} validation images are not used; --validation evaluates "
            "on them instead of the test set, for choosing hyperparameters"
        )
    if transpose:
        arrays |= {
            key: np.ascontiguousarray(arrays[key].transpose(0, 2, 1, 3))
            for key in ("x_train", "x_test")
        }
    name_in_use = one_line(to_utf_8(name or path.stem).decode())
    if not name and "mnist" in path.stem.lower():
        name_in_use += " (not the original MNIST)"
    if validation:
        name_in_use += ", evaluated on its validation images"
    notices += brightness_notices(arrays["x_train"])
    dataset = make_dataset(name_in_use, arrays, notices)
    return make_dataset("MNIST", arrays) if dataset.is_mnist and not name else dataset


def load_custom(data: Any) -> Dataset:
    """Load the data set of --data, with its validation images if --validation is given."""
    if data.validation:
        check_test_set(data)
    return load_files(
        data.data,
        data.data_name,
        data.transpose,
        data.validation,
        data.height_and_width,
        data.test_share,
    )


def check_test_set(data: Any) -> None:
    """Raise UserError for flags of the group Data by which no test set, or two, would be chosen."""
    if data.validation and not data.data:
        raise UserError(
            f"validation=True: {data.dataset} has no validation images; hold out some of the "
            "training images with --holdout"
        )
    if data.validation and data.holdout:
        raise UserError(
            f"holdout={data.holdout} and validation=True both replace the test set; drop one of "
            "them"
        )


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Return the data with `count` of the training images in the test set's place, the same for
    every seed."""
    images, labels = dataset.train
    if count >= len(labels):
        raise UserError(
            f"holdout={count} leaves none of the {len(labels)} training images; choose a smaller "
            "number"
        )
    test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [count])
    if len(np.unique(labels[train])) != len(np.unique(labels)):
        raise UserError(
            f"holdout={count} leaves no training image of some label; choose a smaller number"
        )
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
    return replace(make_dataset(name, arrays, dataset.notices), places=train)


def read_npz(path: Path) -> Arrays:
    """Return the arrays of an .npz by Keras' names. Raises UserError if it cannot be read."""
    source = f"data={str(path)!r:.200}"
    try:
        content = io.BytesIO(read_bytes(path))
        size = sum(member.file_size for member in zipfile.ZipFile(content).infolist())
        if size > idx.MOST_BYTES:
            raise OSError(0, f"{size / 1e9:,.0f} GB, more than the limit of 8")
        with np.load(content, allow_pickle=False) as npz:
            names = find_names(npz.files)
            # A member that is no .npy comes as bytes. What is not asked for may hold objects.
            arrays = {key: np.asarray(npz[name]) for key, name in names.items()}
    except Exception as error:  # NumPy and zipfile raise a dozen kinds on a damaged file
        objects = "Object arrays" in str(error)
        known = (
            "it contains Python objects, not numbers"
            if objects
            else ("truncated, or not an .npz file")
        )
        reason = getattr(error, "strerror", None) or known
        raise UserError(
            f"{source} cannot be read ({reason}); give a complete .npz with Keras' array names, "
            "or a folder of IDX files"
        ) from error
    wanted = [key for key in KEYS if key.endswith("_train")] if without_tests(arrays) else KEYS
    absent = [key for key in wanted if key not in arrays]
    if absent:
        raise UserError(f"{source} has no array {min(absent)}; it needs {', '.join(KEYS)}")
    return arrays


def without_tests(arrays: Arrays) -> bool:
    """Return whether arrays have training images and no test images, which --test-share takes."""
    return {"x_train", "y_train"} <= arrays.keys() and not {"x_test", "y_test"} & arrays.keys()


def find_names(stored: Sequence[str]) -> dict[str, str]:
    """Return our name of an array -> the one that it is stored under, of those that we use."""
    names = {key: key for key in KEYS if key in stored}  # of data without a test set, some of them
    for own in (KEYS, *OTHER_KEYS):
        if set(own) <= set(stored):
            names = dict(zip(KEYS, own, strict=False))  # of two: those of the training images
            break
    for images, labels in VALIDATION_KEYS:
        if {images, labels} <= set(stored):
            names |= {"x_val": images, "y_val": labels}
    return names | ({OWNERS: OWNERS} if OWNERS in stored else {})
