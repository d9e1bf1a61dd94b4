"""Pictures as they lie on the disk: a folder of folders, one for each class.

The part, train or test, is the folder above the classes; without such folders a share of the
pictures becomes the test set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.storage.files import briefly
from harness.training.dataset import OWNERS, Arrays
from variants.canonical import check_labelled
from variants.idx import MOST_BYTES

import numpy as np
import sklearn.model_selection
from PIL import Image, ImageOps

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
MODES_OF_GREY = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "F")  # Pillow's
PARTS = {  # words in the name of a part's folder, such as seg_train or training_set
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "val": {"val", "valid", "validation"},
}


class Found(NamedTuple):
    """The pictures of a part: their files, and the name of each one's class."""

    files: list[Path]
    labels: list[str]
    strays: list[Path]  # files that are not pictures


def has_pictures(folder: Path) -> bool:
    """Return whether a folder has folders with pictures, a class each, or such parts."""
    top = descend(folder)
    return any(find_pictures(part).files for part in (top, *find_parts(top).values()))


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder in the order of their names, without hidden ones."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__"))]


def find_parts(folder: Path) -> dict[str, Path]:
    """Return "train", "test" and "val" -> their folders, those that there are."""
    found: dict[str, Path] = {}
    for sub in subfolders(folder):
        words = set(re.split(r"[\W_]+", sub.name.lower()))
        for part, own_words in PARTS.items():
            # a class may be called train; it has no folders in it
            if words & own_words and subfolders(sub):
                found.setdefault(part, descend(sub))
    return found


def descend(folder: Path) -> Path:
    """Return the folder itself, or the one below it that alone has all folders of classes.

    Archives have folders such as seg_train/seg_train/buildings.
    """
    inside = subfolders(folder)
    while len(inside) == 1 and subfolders(inside[0]):
        folder = inside[0]
        inside = subfolders(folder)
    return folder


def find_pictures(folder: Path) -> Found:
    """Return the pictures in the folders of a part's classes, in the order of their names."""
    found = Found([], [], [])
    for class_folder in subfolders(folder):
        for place, folders, names in os.walk(class_folder):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "@", "__")))
            for name in sorted(names):
                path = Path(place, name)
                if name.lower().endswith(ENDINGS) and not name.startswith("."):
                    found.files.append(path)
                    found.labels.append(class_folder.name)
                else:
                    found.strays.append(path)
    try:
        beside = [entry for entry in sorted(folder.iterdir()) if entry.is_file()]
    except OSError:
        beside = []
    found.strays.extend(beside)
    return found


def read_folder(
    folder: Path, source: str, size: tuple[int, int] | None, test_share: float
) -> tuple[Arrays, list[str]]:
    """Return the arrays of a folder of folders, and what the user should know.

    With `size` (height, width) each picture is resized. Raises UserError for pictures that cannot
    be read or have several sizes, and without a test set.
    """
    folders = find_parts(descend(folder))
    if "train" not in folders:
        for part, path in folders.items():
            raise UserError(
                f"{source} has {path.name!r:.60}, of {part} images, but no folder of those to "
                "train on; call it train"
            )
        folders = {"train": descend(folder)}
    found = {part: find_pictures(path) for part, path in folders.items()}
    check_numbers(found.values(), source)
    labels = {part: np.array(of_part.labels) for part, of_part in found.items()}
    every_name = {name for names in labels.values() for name in set(names)}
    if all(name.isascii() and name.isdigit() and len(name) < 19 for name in every_name):
        labels = {part: names.astype(np.int64) for part, names in labels.items()}
    every = [path for of_part in found.values() for path in of_part.files]
    if not found["train"].files:
        raise UserError(
            f"{source} has no pictures in {folders['train']}; put those of each class into a folder"
        )
    is_grey = all(map(is_grey_picture, every))
    raw: Arrays = {}
    for part, of_part in found.items():
        if of_part.files:
            raw[f"x_{part}"] = read_pictures(of_part.files, source, size, is_grey)
            raw[f"y_{part}"] = labels[part]
    notices = []
    if "x_val" in raw and "x_test" not in raw:
        raw |= {"x_test": raw["x_val"], "y_test": raw["y_val"]}
        notices.append(f"{source} has no folder test; the validation images are the test set")
    strays = [path for of_part in found.values() for path in of_part.strays]
    if strays:
        notices.append(
            f"{source}: skipped {len(strays):,} files that are not pictures in a class's folder, "
            f"such as {strays[0].name}"
        )
    return with_test_set(raw, source, test_share), notices


def check_numbers(parts: Iterable[Found], source: str) -> None:
    """Raise UserError if two class folders of a part have the same number as a name: 1 and 01."""
    for part in parts:
        numbers: dict[int, str] = {}
        for name in sorted({name for name in part.labels if name.isascii() and name.isdigit()}):
            other = numbers.setdefault(int(name), name)
            if other != name:
                raise UserError(
                    f"{source} has the class folders {other!r} and {name!r}, which are the same "
                    "number; rename one, or merge them"
                )


def is_grey_picture(path: Path) -> bool:
    """Return whether a picture has no colours. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.mode in MODES_OF_GREY
    except Exception as error:  # Pillow raises a dozen kinds
        raise UserError(
            f"{str(path)!r:.200} cannot be read as a picture ({briefly(error)}); remove it"
        ) from error


def to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Return the values of a picture of 16 bits (mode I), or of fractions (mode F), in 0..255.

    The scale is the same for all pictures: 65,535, or 1, becomes 255. Raises ValueError for other
    values.
    """
    most = 1 if mode.startswith("F") else 65_535
    if not (values.min() >= 0 and values.max() <= most):  # NaN is neither
        raise ValueError(f"values outside 0 to {most:,}; save it with 8 bits")
    return (255 / most * values).astype(np.uint8)


def decode(
    file: Any, source: str, size: tuple[int, int] | None, is_grey: bool | None
) -> tuple[np.ndarray, str]:
    """Return a picture uint8[H,W], or uint8[H,W,3] with colours, as it is looked at, and its mode.

    `file` is a path or a stream. With `size` (height, width) it is resized; with `is_grey` None it
    keeps its own colours or none. Raises UserError if it cannot be read.
    """
    try:
        with Image.open(file) as opened:
            mode = opened.mode
            upright = ImageOps.exif_transpose(opened)
            if mode.startswith(("I", "F")):
                upright = Image.fromarray(to_8_bits(np.asarray(upright, np.float64), mode))
            if "transparency" in upright.info or mode in ("RGBA", "LA", "PA"):
                over_white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(over_white, upright.convert("RGBA"))
            becomes_grey = mode in MODES_OF_GREY if is_grey is None else is_grey
            picture = upright.convert("L" if becomes_grey else "RGB")
            if size and picture.size != (size[1], size[0]):
                picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.array(picture), mode
    except Exception as error:  # Pillow raises a dozen kinds
        raise UserError(
            f"{source} cannot be read as a picture ({briefly(error)}); remove it"
        ) from error


def read_picture(path: Path, size: tuple[int, int] | None, is_grey: bool | None) -> np.ndarray:
    """Return the picture in a file; see decode."""
    return decode(path, f"{str(path)!r:.200}", size, is_grey)[0]


def read_pictures(
    files: Sequence[Path], source: str, size: tuple[int, int] | None, is_grey: bool
) -> np.ndarray:
    """Return pictures of one size as uint8[n,H,W] or uint8[n,H,W,3]."""
    first = read_picture(files[0], size, is_grey)
    if first.nbytes * len(files) > MOST_BYTES:
        raise UserError(
            f"{source}: {len(files):,} pictures of {first.shape[0]}x{first.shape[1]} take more "
            "than 8 GB; give a smaller --image-size"
        )
    images = np.empty((len(files), *first.shape), np.uint8)
    for place, path in enumerate(files):
        image = read_picture(path, size, is_grey)
        if image.shape != first.shape:
            sizes = " and ".join(f"{one.shape[0]}x{one.shape[1]}" for one in (first, image))
            raise UserError(
                f"{source} has pictures of several sizes, such as {sizes}; give one with "
                f"--image-size {first.shape[0]}x{first.shape[1]}"
            )
        images[place] = image
    return images


def with_test_set(raw: Arrays, source: str, test_share: float) -> Arrays:
    """Return the arrays with a test set: their own, or a share of the training images.

    The share has the labels in the same proportions and is the same for every seed. Raises
    UserError for both, or neither.
    """
    if "x_test" in raw:
        if test_share:
            raise UserError(
                f"{source} has a test set of its own, so test_share={test_share:g} has no use; "
                "drop it"
            )
        return raw
    if not test_share:
        raise UserError(
            f"{source} has no test set; set a share of the images aside with --test-share 0.2"
        )
    labels = raw["y_train"]
    if len(raw["x_train"]) != len(labels):
        raise UserError(
            f"{source}: {len(raw['x_train']):,} training images have {len(labels):,} labels; give "
            "one label per image"
        )
    if len(raw.get(OWNERS, labels)) != len(labels):
        raise UserError(
            f"{source}: {OWNERS} has {len(raw[OWNERS]):,} entries for {len(labels):,} training "
            "images; give one per image"
        )
    check_labelled(labels, source)
    places = np.arange(len(labels))
    try:
        train, test = sklearn.model_selection.train_test_split(
            places, test_size=test_share, random_state=0, stratify=labels
        )
    except (TypeError, ValueError) as error:  # a label of one image, more labels than test images
        raise UserError(
            f"test_share={test_share:g} cannot be drawn from {len(labels):,} images with the "
            f"labels in the same proportions ({briefly(error)}); choose another share, or label "
            "all images"
        ) from error
    keys = [key for key in raw if key.endswith("_train")]
    split = {key: raw[key][np.sort(train)] for key in keys}
    tests = {f"{key[0]}_test": raw[key][np.sort(test)] for key in ("x_train", "y_train")}
    return raw | split | tests
