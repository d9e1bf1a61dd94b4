"""--predict: a trained model on pictures from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.command_line import one_at_a_time
from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.cli.output import print_line
from harness.storage.files import expand_path, one_line

import numpy as np
import tensorflow as tf

MOST_LABELS = 3  # that are printed for a picture
CANVAS = 28  # of MNIST, whose digits were fitted into 20x20 and centred by their mass
INNER = 20
LOOKED_AT = 500  # training images, for their backgrounds
RARE = 0.02  # share of training images with a background, below which they have the other


class Prepared(NamedTuple):
    """A picture as the model takes it, and what was done to it."""

    image: np.ndarray  # uint8[H,W,channels]
    steps: list[str]


def find_pictures(names: list[str]) -> list[Path]:
    """Return the files that are named, and the pictures in the folders. Raises UserError."""
    endings = import_function("pictures:ENDINGS")
    found: list[Path] = []
    for name in names:
        path = expand_path(name)
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings]
            found += [file for file in inside if file.is_file() and not file.name.startswith(".")]
        else:
            found.append(path)
    if not found:
        raise UserError(
            f"predict: no pictures in {', '.join(names) or 'the command'!s:.100}; name pictures or "
            "folders of pictures after the run, such as --predict runs/mine digit.png"
        )
    return found


def border_of(image: np.ndarray) -> float:
    """Return the median of the outermost pixels of an image uint8[H,W,...]."""
    rows = [image[0], image[-1], image[:, 0], image[:, -1]]
    return float(np.median(np.concatenate([row.reshape(-1) for row in rows])))


def share_of_bright(images: np.ndarray) -> float:
    """Return how many of the images uint8[n,H,W,channels] have a bright background, of 1."""
    return float(np.mean([border_of(image) > 127 for image in images]))


def prepare(
    path: Path, dataset: Any, bright_share: float, is_mnist: bool, is_stretched: bool
) -> Prepared:
    """Return a picture as it would look among the training images of `dataset`.

    Grey if these are; inverted if its background is bright and all theirs are dark, or the reverse,
    by `bright_share`, the share of bright ones among them; and of their size: with `is_stretched`
    as --image-size resizes pictures, else with a border around it. With `is_mnist` a digit is
    centred as MNIST's are.
    """
    height, width, channels = dataset.image_shape
    if channels not in (1, 3):
        raise UserError(
            f"predict: the model takes {channels} channels, and pictures have 1 or 3; call "
            "fl.load(RUN).model() on arrays"
        )
    is_grey = channels == 1
    image, mode = import_function("pictures:decode")(path, one_line(str(path)), None, is_grey)
    has_colours = mode not in import_function("pictures:MODES_OF_GREY")
    steps = [f"colours ({mode}) to grey"] if is_grey and has_colours else []
    alike = bright_share if border_of(image) > 127 else 1 - bright_share
    if is_grey and alike < RARE:
        image = 255 - image
        steps.append("inverted, as the training images have the other background")
    if image.shape[:2] == (height, width):
        return Prepared(image.reshape(dataset.image_shape), steps)
    size = f"{image.shape[0]}x{image.shape[1]}"
    if is_mnist and image.max() > image.min():
        steps.append(f"{size} centred in 28x28 as MNIST's digits are")
        return Prepared(centre(image)[..., None], steps)
    squared = image if is_stretched else pad_to(image, height / width)
    steps.append(f"{size} resized to {height}x{width}")
    resized = tf.image.resize(np.atleast_3d(squared), (height, width), antialias=True).numpy()
    return Prepared(resized.round().clip(0, 255).astype(np.uint8), steps)


def pad_to(image: np.ndarray, ratio: float) -> np.ndarray:
    """Return an image [H,W,...] with its border's grey around it, so that H / W is `ratio`."""
    height, width = image.shape[:2]
    rows = max(round(width * ratio) - height, 0)
    columns = max(round(height / ratio) - width, 0)
    around = [(rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)]
    around += [(0, 0)] * (image.ndim - 2)
    return np.pad(image, around, constant_values=round(border_of(image)))


def centre(image: np.ndarray) -> np.ndarray:
    """Return bright ink on a dark ground, uint8[H,W], as uint8[28,28] with its mass in the middle.

    The ink fits into 20x20, as LeCun et al. 1998 made MNIST.
    """
    ink = image.astype(np.float32) - border_of(image)
    ink = (255 * ink / ink.max()).clip(0, 255) if ink.max() > 0 else ink.clip(0, 255)
    rows = np.flatnonzero((ink > 64).any(axis=1))
    columns = np.flatnonzero((ink > 64).any(axis=0))
    if not len(rows):
        return np.zeros((CANVAS, CANVAS), np.uint8)
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = INNER / max(box.shape)
    size = [max(1, round(scale * length)) for length in box.shape]
    small = tf.image.resize(box[..., None], size, antialias=True).numpy()[..., 0].clip(0, 255)
    mass = small.sum()
    middle = [
        (np.arange(length) * small.sum(axis=1 - axis)).sum() / mass
        for axis, length in enumerate(size)
    ]
    offsets = [
        int(np.clip(round((CANVAS - 1) / 2 - place), 0, CANVAS - length))
        for place, length in zip(middle, size, strict=True)
    ]
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    target = canvas[offsets[0] : offsets[0] + size[0], offsets[1] : offsets[1] + size[1]]
    target[...] = small.round()
    return canvas


@one_at_a_time()
def predict_pictures(run: Any, flags: Any) -> list[dict[str, Any]]:
    """Print the labels that the model of a SavedRun predicts; return a dict for each picture.

    With --json nothing is printed here.

    A dict has the file, the most probable label, the probabilities of all labels and what was done
    to the picture. `flags`, of the group Run, name the pictures. Raises UserError for pictures that
    cannot be read.
    """
    names = flags.pictures.split("\n") if flags.pictures else []
    paths = find_pictures(names)
    data = run.config.data
    is_mnist = run.dataset.is_mnist or (data.dataset == "mnist" and not data.data)  # with holdout
    is_stretched = bool(data.image_size)
    bright_share = share_of_bright(run.dataset.train.images[:LOOKED_AT])
    prepared = [prepare(path, run.dataset, bright_share, is_mnist, is_stretched) for path in paths]
    images = np.stack([one.image for one in prepared]).astype(np.float32)
    probabilities = tf.nn.softmax(run.model().predict(images, verbose=0)).numpy()
    classes = run.dataset.classes
    found = []
    for path, one, shares in zip(paths, prepared, probabilities, strict=True):
        order = np.argsort(-shares, kind="stable")
        best = [f"{classes[label]} ({shares[label]:.1%})" for label in order[:MOST_LABELS]]
        if not flags.json:
            done = f"   [{'; '.join(one.steps)}]" if one.steps else ""
            print_line(f"{one_line(str(path))}: {', '.join(best)}{done}")
        found.append(
            {
                "file": str(path),
                "label": classes[order[0]],
                "probability": float(shares[order[0]]),
                "probabilities": {
                    str(name): float(share) for name, share in zip(classes, shares, strict=True)
                },
                "steps": one.steps,
            }
        )
    return found
