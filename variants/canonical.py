"""Input formats: arrays of many forms become images uint8[n,H,W,C] in 0..255, and labels 0, 1, ...
of the smallest unsigned type.

Height, width, channels last or first, labels one-hot or from 1, fractions: all are taken. What
would lose information is refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from harness.cli.fields import UserError
from harness.training.dataset import OWNERS, Arrays, format_shape

import numpy as np

PARTS = ("train", "test")
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MAX_CLASSES = 2**16
HALF = 128  # training images whose highest value is below it may be in another scale than 0..255
DARKEST = 32  # images in fractions whose highest is below it are in no usual scale


class Scale(NamedTuple):
    """Images x become (x + offset) * factor, in 0..255; `notice` says it where it changes them."""

    offset: float
    factor: float
    notice: str


SCALES = {
    "0..255": Scale(0, 1, ""),
    "0..1": Scale(0, 255, "pixel values in 0..1 were multiplied by 255"),
    "-1..1": Scale(1, 127.5, "pixel values in -1..1 were mapped to 0..255"),
}


def to_canonical_arrays(raw: Arrays, source: str) -> tuple[Arrays, list[str]]:
    """Return the arrays in our form, with `classes`, and what was done to them.

    Raises UserError if they hold something else; `source` is what it calls them.
    """
    labels = {part: to_labels(raw[f"y_{part}"], f"{source}: y_{part}") for part in PARTS}
    images = {
        part: to_images(raw[f"x_{part}"], labels[part].shape, f"{source}: x_{part}")
        for part in PARTS
    }
    for part in PARTS:
        if labels[part].shape != images[part].shape[:1]:
            wanted = f"{images[part].shape[:1]}, one label per image"
            raise UserError(
                f"{source}: y_{part} has shape {raw[f'y_{part}'].shape}; it must be {wanted}"
            )
    shapes = {part: format_shape(images[part].shape[1:]) for part in PARTS}
    if shapes["train"] != shapes["test"]:
        raise UserError(
            f"{source}: x_train has images of {shapes['train']}, but x_test of {shapes['test']}; "
            "both must have one shape"
        )
    grey_levels, notices = to_grey_levels(images, source)
    places, classes, label_notices = to_places(labels, source)
    notices += label_notices
    leaked = count_shared(grey_levels["train"], grey_levels["test"])
    if leaked:
        notices.append(
            f"{source}: {leaked:,} of the {len(grey_levels['test']):,} test images are also "
            "training images; the test accuracy overestimates the accuracy on new images"
        )
    arrays = {f"x_{part}": np.ascontiguousarray(array) for part, array in grey_levels.items()}
    arrays |= {f"y_{part}": array for part, array in places.items()}
    arrays["classes"] = classes
    if OWNERS in raw:
        if raw[OWNERS].shape != places["train"].shape or raw[OWNERS].dtype.kind not in "uiUS":
            wanted = f"{places['train'].shape}, the owner of each training image"
            raise UserError(
                f"{source}: {OWNERS} is {raw[OWNERS].dtype}{raw[OWNERS].shape}; it must be {wanted}"
            )
        arrays[OWNERS] = raw[OWNERS]
    return arrays, notices


def to_images(array: np.ndarray, labels_shape: tuple[int, ...], source: str) -> np.ndarray:
    """Return images of any usual shape as [n,H,W,C], n > 0, of their own type and scale.

    Flat ones are grey squares. The number of labels tells where Matlab's order, [H,W,C,n], stands.
    """
    if array.dtype.kind not in "buif":
        raise UserError(f"{source} is {array.dtype}; images must be numbers")
    num_labels = labels_shape[0] if labels_shape else 0
    images = array
    if images.ndim in (3, 4) and images.shape[0] != num_labels == images.shape[-1]:
        images = np.moveaxis(images, -1, 0)
    if images.ndim == 2 and math.isqrt(images.shape[1]) ** 2 == images.shape[1]:
        side = math.isqrt(images.shape[1])
        images = images.reshape(len(images), side, side)
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim == 4 and images.shape[3] not in CHANNELS and images.shape[1] in CHANNELS:
        images = np.moveaxis(images, 1, 3)
    if images.ndim != 4 or images.shape[3] not in CHANNELS or images.size == 0:
        raise UserError(
            f"{source} has shape {array.shape}; it must be (n, height, width), n > 0; for colour "
            "images (n, height, width, 3) or (n, 3, height, width); for flat square grey images "
            "(n, 784)"
        )
    if array.dtype.kind == "f" and np.isnan(images).any():
        num_spoilt = int(np.isnan(images).reshape(len(images), -1).any(axis=1).sum())
        raise UserError(
            f"{source}: {num_spoilt:,} of {len(images):,} images contain NaN; leave them out, or "
            "replace the NaN"
        )
    low = float(images.min())
    high = float(images.max())
    lowest = -1 if array.dtype.kind == "f" and high <= 1 else 0
    if not np.isfinite(high - low) or low < lowest or high > 255:
        raise UserError(
            f"{source} is {array.dtype} in {low:g}..{high:g}; images must lie in 0..255"
        )
    return images.astype(np.uint8) if array.dtype.kind == "b" else images


def to_grey_levels(images: Arrays, source: str) -> tuple[Arrays, list[str]]:
    """Return images of both parts as uint8 in 0..255, and what was done to them."""
    names = {part: name_scale(array) for part, array in images.items()}
    if set(names.values()) == {"0..1", "-1..1"}:  # one part happens to have no negative number
        names = dict.fromkeys(PARTS, "-1..1")
    if names["train"] != names["test"]:
        ranges = [f"x_{part} in {array.min():g}..{array.max():g}" for part, array in images.items()]
        raise UserError(f"{source}: {' but '.join(ranges)}; both must have one scale")
    scale = SCALES[names["train"]]
    notices = [f"{source}: {scale.notice}"] if scale.notice else []
    rounded = {}
    for part, array in images.items():
        if array.dtype == np.uint8 and scale.factor == 1:
            rounded[part] = array
            continue
        exact = (array + scale.offset if scale.offset else array) * scale.factor
        rounded[part] = np.round(exact).astype(np.uint8)
        if np.abs(exact - rounded[part]).max() > 0.01:
            if exact.max() < DARKEST:
                raise UserError(
                    f"{source}: x_{part} is {array.dtype} in 0..{exact.max():g}, and rounding it "
                    "to grey levels would lose information; scale it to 0..1 or 0..255"
                )
            notices.append(f"{source}: x_{part} was rounded to 256 grey levels")
    return rounded, notices


def name_scale(images: np.ndarray) -> str:
    """Return the key in SCALES of images in their own scale."""
    if images.min() < 0:
        return "-1..1"
    return "0..1" if images.max() <= 1 else "0..255"


def to_places(labels: Arrays, source: str) -> tuple[Arrays, np.ndarray, list[str]]:
    """Return labels as their places 0, 1, ... among the training labels, these, and a notice."""
    kinds = {part: array.dtype.kind for part, array in labels.items()}
    if kinds["train"] != kinds["test"]:
        raise UserError(
            f"{source}: only one of y_train and y_test has texts as labels; both must have them"
        )
    classes = np.unique(labels["train"])
    strange = np.setdiff1d(labels["test"], classes)
    if len(strange):
        raise UserError(
            f"{source}: label {strange[0]} occurs in y_test but not in y_train; use a matching "
            "training and test set"
        )
    if len(classes) < 2:
        raise UserError(
            f"{source}: all images have the label {classes[0]}; at least two labels are needed"
        )
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{source}: {len(classes)} labels are too many; use data of at most {MAX_CLASSES}"
        )
    notices = []
    is_named = kinds["train"] == "U"
    if not is_named and (classes[0] != 0 or classes[-1] != len(classes) - 1):
        span = f"{classes[0]}..{classes[-1]}"
        notices.append(
            f"{source}: the {len(classes)} labels in {span} are mapped to 0..{len(classes) - 1}"
        )
    smallest = np.min_scalar_type(len(classes) - 1)
    places = {
        part: np.searchsorted(classes, array).astype(smallest) for part, array in labels.items()
    }
    return places, classes, notices


def count_shared(train: np.ndarray, test: np.ndarray) -> int:
    """Return how many of the test images uint8[n,H,W,C] are training images, pixel for pixel."""
    known = {hash(image.tobytes()) for image in train}
    return sum(hash(image.tobytes()) in known for image in test)


def to_labels(array: np.ndarray, source: str) -> np.ndarray:
    """Return labels of shape (n,), (n,1) or one-hot (n,C) as int64[n], texts as an array of str."""
    if array.dtype.kind in "SO":
        array = to_texts(array, source)
    check_labelled(array, source)
    if array.dtype.kind == "U":
        return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.dtype.kind not in "uifb" or (
        array.dtype.kind == "f" and not (np.round(array) == array).all()
    ):
        raise UserError(f"{source} is {array.dtype}; labels must be integers")
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
            f"{source} spans {array.min()}..{array.max()}; labels must be small integers"
        )
    return array.astype(np.int64)


def to_texts(array: np.ndarray, source: str) -> np.ndarray:
    """Return labels that are bytes or Python objects as texts or numbers.

    Raises UserError for other objects, and for missing ones.
    """
    values = [
        value.decode(errors="replace") if isinstance(value, bytes) else value
        for value in array.ravel().tolist()
    ]
    num_missing = sum(value is None or value != value for value in values)
    if num_missing:
        raise UserError(unlabelled(source, num_missing, len(values), "missing (None or NaN)"))
    if len({type(value) for value in values}) > 1 or not isinstance(values[0], str | int | float):
        raise UserError(
            f"{source} mixes types, or has Python objects; labels must be integers or texts"
        )
    return np.array(values).reshape(array.shape)


def check_labelled(array: np.ndarray, source: str) -> None:
    """Raise UserError if labels have the marks of unlabelled images: NaN, -1 or an empty text."""
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise UserError(unlabelled(source, int(np.isnan(array).sum()), len(array), "NaN"))
    if array.dtype.kind == "U" and (array == "").any():
        raise UserError(unlabelled(source, int((array == "").sum()), len(array), "empty texts"))
    # Labels of -1 and 1 alone are those of two classes.
    is_signed = array.dtype.kind in "if" and array.ndim and len(array) and array.min() == -1
    if is_signed and len(np.unique(array)) > 2:
        raise UserError(unlabelled(source, int((array == -1).sum()), len(array), "-1"))


def unlabelled(source: str, count: int, total: int, mark: str) -> str:
    """Return the error for unlabelled images."""
    return (
        f"{source}: {count:,} of {total:,} labels are {mark}, which stands for unlabelled images; "
        "leave those images out"
    )


def brightness_notices(images: np.ndarray) -> list[str]:
    """Return what is unusual about training images uint8[n,H,W,C]; colours may be bright."""
    highest = int(images.max())
    if highest < HALF:
        return [
            f"the highest pixel value is {highest}, but 255 is white; if white is {highest} in "
            f"these data, multiply them by {255 / max(highest, 1):.4g}, or training will be slow"
        ]
    mean = images.mean()
    if mean > 127 and images.shape[3] == 1:
        return [
            f"the images are bright (mean {mean:.0f} of 255), like dark strokes on white; if "
            "accuracy stays at chance, invert them or try --client-lr 0.01"
        ]
    return []
