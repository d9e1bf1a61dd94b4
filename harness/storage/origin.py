"""Where a saved model is from: the data that it was trained on, by the files of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.cli.output import warn
from harness.cli.saved_config import read_saved
from harness.reporting.results import chosen_on
from harness.storage.files import expand_path, read_json

import numpy as np


def load_own_data(folder: Path, default: Any, load_dataset: Callable) -> Any:
    """Return the data set of a run, or None if it cannot be loaded any more.

    `default` is the default configuration, `load_dataset` the script's function.
    """
    try:
        dataset = load_dataset(read_saved(str(folder), default).data)
        own = read_json(folder / "partition.json").get("dataset_sha256")
    except UserError:
        return None
    return dataset if dataset.digest == own else None


def trained_images(folder: Path, config: Any, own: Any) -> np.ndarray:
    """Return the images uint8[n,H,W,channels] of its data that a run's clients trained on.

    `config` is that of the run. Of a private run, which does not list them, all training images.
    """
    saved = read_json(folder / "partition.json")
    images = own.train.images
    if "indices_of" not in saved:
        return images
    drawn = range(len(saved["indices"]))
    if config.num_unseen:
        drawn = import_function("adversity:drawn_clients")(config)
    used = np.setdiff1d(
        np.concatenate([saved["indices"][client] for client in drawn]),
        np.concatenate(saved.get("test_indices") or [[]]),
    )
    places = np.arange(len(images)) if own.places is None else own.places
    return images[np.isin(places, used)]


def count_known(images: np.ndarray, known: np.ndarray) -> int:
    """Return how many of the images are, byte for byte, among the known ones."""
    if images.shape[1:] != known.shape[1:]:
        return 0
    hashes = set(map(hash_image, known))
    return sum(hash_image(image) in hashes for image in images)


def hash_image(image: np.ndarray) -> bytes:
    """Return 16 bytes that stand for an image."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def describe_origin(folder: Path, config: Any, dataset: Any, load_dataset: Callable) -> str:
    """Describe, for a caption, the data that the model of a run is evaluated on.

    `config` is that of the run. Warns about images that the model was trained on.
    """
    if read_json(folder / "partition.json").get("dataset_sha256") == dataset.digest:
        is_test_set = chosen_on(config.data) == "the test set"
        return ", on its own test set" if is_test_set else ", on its own evaluation images"
    own = load_own_data(folder, type(config)(), load_dataset)
    if own is None:
        return ", trained on other data"
    images = trained_images(folder, config, own)
    num_tests = len(dataset.test.labels)
    num_known = count_known(dataset.test.images, images)
    if num_known:
        warn(
            f"the model was trained on {num_known:,} of the {num_tests:,} images, so its accuracy "
            "on them does not tell that on new images"
        )
        return f", trained on {num_known:,} of these {num_tests:,} images"
    if count_known(dataset.train.images, images):
        return ", trained on other images of these data"
    return ", trained on other data"


def read_origin(model: str) -> dict[str, Any]:
    """Return the partition.json next to a saved model, or {} without one."""
    try:
        return read_json(expand_path(model).parent / "partition.json")
    except UserError:
        return {}


def origin_notices(model: str, dataset: Any) -> list[str]:
    """Return what the user should know of a run that begins from a saved model: other classes."""
    classes = read_origin(model).get("classes") if model else None
    if classes in (None, list(dataset.classes)):
        return []
    return [
        f"initial_model={model!r:.100} was trained on the labels {classes!s:.60}, which its "
        f"outputs stand for; these data have {list(dataset.classes)!s:.60}"
    ]


def list_ancestors(model: str, default: Any) -> list[str]:
    """Return a saved model, the one that its run began from, and so on."""
    found: list[str] = []
    while model and model not in found:
        found.append(model)
        try:
            model = read_saved(str(expand_path(model).parent), default).training.initial_model
        except UserError:  # no run's folder
            break
    return found


def check_private_origin(config: Any, dataset: Any, load_dataset: Callable) -> None:
    """Raise UserError for a private run from a model that may know the same images.

    Its epsilon would be that of its own rounds, not of all that is released about a client.
    """
    given = config.training.initial_model if config.is_private else ""
    for model in list_ancestors(given, type(config)()):
        recorded = read_origin(model).get("dataset_sha256", dataset.digest)
        own = load_own_data(expand_path(model).parent, type(config)(), load_dataset)
        if recorded == dataset.digest or (
            own is not None and count_known(dataset.train.images, own.train.images)
        ):
            raise UserError(
                f"initial_model={given!r:.100} cannot be combined with aggregator='dp': it may "
                "have been trained on the same images, and epsilon would be false; start from the "
                "seed, or from a model in the folder of a run on other images"
            )
        if own is None:
            warn(
                f"the data of {model} cannot be loaded, so it was not checked whether it was "
                "trained on images of these clients, which would make epsilon false"
            )
