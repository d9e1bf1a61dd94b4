"""Splits that are given: in a file, by index arrays in Python, or by a user's own function.

What is wrong with one is a UserError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from harness.cli.fields import UserError
from harness.reporting.results import pluralize
from harness.storage.files import expand_path, io_errors_as_user_errors, read_bytes, write_file
from harness.training import shards
from variants.choices import PARTITIONS
from variants.partitions import Indices, count_tests

import numpy as np


def from_places(parts: Indices, claims: dict[str, Any], name: str, dataset: Any) -> Indices:
    """Return indices into all training images as those into the ones that are not held out.

    `claims` are what the file says of itself. One of an earlier version counts those that are left.
    """
    is_of_left = "indices_of" not in claims and claims.get("dataset_sha256") == dataset.digest
    if dataset.places is None or is_of_left:
        return parts
    here = np.full(len(dataset.places) + len(dataset.test.labels), -1)
    here[dataset.places] = np.arange(len(dataset.places))
    left = [here[part][here[part] >= 0] for part in parts]
    empty = [client for client, part in enumerate(left) if len(part) == 0]
    if empty:
        raise UserError(
            f"{name}: all images of client {empty[0]} are held out; choose a smaller --holdout"
        )
    return left


def check_indices(indices: Any) -> None:
    """Raise UserError unless a split from Python is K lists or arrays of disjoint indices.

    Whether an image is outside the training images is only known with the data (read_split).
    """
    is_single = isinstance(indices, str | bytes) or not hasattr(indices, "__len__")
    if is_single or isinstance(indices, np.ndarray) and indices.ndim == 0:
        raise UserError(
            f"partition={indices!r:.60} is not a list of index arrays; give one list of "
            "training-image indices per client"
        )
    try:
        sorted(indices if isinstance(indices, dict) else ())
    except TypeError as error:
        raise UserError(
            f"partition has keys that cannot be sorted ({error}); use keys of one type"
        ) from error
    if not len(indices):
        raise UserError("partition has no client; give one list of training-image indices each")
    every: list[int] = []
    for client, part in indices.items() if isinstance(indices, dict) else enumerate(indices):
        try:
            array = np.asarray(part)
        except ValueError:  # lists of several lengths
            array = np.array(None)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size or array.min() < 0:
            raise UserError(
                f"partition: client {client!r:.40} has {part!s:.40}, not a list of integers 0, "
                "1, ...; give the indices of its training images, at least one"
            )
        every += array.tolist()
    if len(set(every)) < len(every):
        raise UserError("partition gives an image to two clients, or twice to one; give it once")


def fields_of_indices(indices: Any, cache: str) -> dict[str, Any]:
    """Return the fields of a run on a split from Python, K lists or arrays of training images.

    A dict has the clients as its keys, which are sorted. The split is written into the cache, under
    the hash of its content, and read as any partition_file is.
    """
    check_indices(indices)
    parts = [indices[key] for key in sorted(indices)] if isinstance(indices, dict) else indices
    content = json.dumps({"indices": [np.asarray(part).tolist() for part in parts]})
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = expand_path(cache).absolute() / f"split-{name}.json"
    with io_errors_as_user_errors(path.parent, "--cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content, flag="--cache")
    return {"partition": "file", "partition_file": str(path), "num_clients": len(parts)}


def read_split(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    partition_file: str,
    dataset: Any,
) -> Indices:
    """Return the split in a partition.json of a run or another program: its lists `indices`.

    They count the training images as the data have them, those that are held out too.
    """
    name = f"partition_file={partition_file!r:.100}"
    try:
        content = json.loads(read_bytes(expand_path(partition_file)))
        parts = [np.array(indices) for indices in content["indices"]]
    except Exception as error:  # a damaged file raises a dozen kinds
        reason = getattr(error, "strerror", None) or "not a partition.json with a list `indices`"
        raise UserError(
            f"{name} cannot be read ({reason}); give the partition.json of a run"
        ) from error
    if len(parts) != num_clients:
        raise UserError(
            f"num_clients={num_clients} differs from the {len(parts)} clients of {name}; choose "
            f"{len(parts)}"
        )
    if any(part.ndim != 1 or part.dtype != np.int64 or len(part) == 0 for part in parts):
        raise UserError(
            f"{name} has a client without images, or indices that are not integers; fix the file"
        )
    every = np.concatenate(parts)
    num_images = len(labels) + (0 if dataset.places is None else len(dataset.test.labels))
    if every.min() < 0 or every.max() >= num_images or len(np.unique(every)) != len(every):
        raise UserError(
            f"{name} lists an image twice, or one outside the {num_images} images; fix the file, "
            "or the indices given with partition="
        )
    return from_places(parts, content, name, dataset)


def check_given_partition(partition: Any, config: Any, dataset: Any) -> None:
    """Raise UserError for a Partition that is not the split of this configuration and data."""
    cure = "give fl.make_partition(dataset, config) of this configuration and data set"
    num_clients = config.partitioning.num_clients
    if len(partition.indices) != num_clients:
        raise UserError(
            f"partition= has {len(partition.indices)} clients, but num_clients={num_clients}; "
            f"{cure}"
        )
    if shards.hash_shards(dataset, partition.indices, config) != partition.digest:
        raise UserError(f"partition= was made for other data, or for changed images; {cure}")
    share = config.partitioning.client_test
    num_tests = list(map(len, partition.test_indices or [()] * num_clients))
    sizes = np.add(partition.sizes, num_tests)
    if num_tests != [count_tests(share, size) for size in sizes.tolist()]:
        raise UserError(
            f"partition= holds out {sum(num_tests):,} images of its clients, which is not "
            f"client_test={share:g} of each; {cure}"
        )
    if partition.drawn_by != config.fields_of_split():
        raise UserError(
            f"partition= is another split than {config.partition_name} of this configuration; "
            f"{cure}, or index arrays such as partition.indices"
        )


def check_draws(
    draw: Callable, labels: np.ndarray, config: Any
) -> Callable[[np.random.Generator], Indices]:
    """Return draw(rng) of a user's function, each of whose splits is checked."""

    def checked_draw(rng):
        return check_own_split(draw(rng), labels, config)

    return checked_draw


def check_own_split(split: Any, labels: np.ndarray, config: Any) -> Indices:
    """Return what a user's function returned, as K disjoint arrays of indices.

    Raises UserError if it is none.
    """
    source = f"partition={config.partition_name!r:.200}"
    num_clients = config.partitioning.num_clients
    try:
        if isinstance(split, dict):
            raise TypeError
        parts = [np.asarray(part) for part in split]
    except (TypeError, ValueError) as error:  # not an iterable; lists of several lengths
        raise UserError(
            f"{source} returns {type(split).__name__}; return an index array for each client"
        ) from error
    if len(parts) != num_clients:
        raise UserError(
            f"{source} returns {len(parts)} arrays for num_clients={num_clients}; return one for "
            "each client"
        )
    if any(part.ndim != 1 or (part.size and part.dtype.kind not in "iu") for part in parts):
        raise UserError(f"{source} returns arrays that are not 1-D integer indices; return those")
    every = np.concatenate([part.astype(np.int64) for part in parts])
    if every.size < num_clients:
        raise UserError(
            f"{source} gives {pluralize(every.size, 'image')} to {num_clients} clients; return at "
            "least one for each client"
        )
    if every.min() < 0 or every.max() >= len(labels):
        raise UserError(f"{source} returns indices outside 0 to {len(labels) - 1}; return those")
    if len(np.unique(every)) != len(every):
        raise UserError(f"{source} gives an image to two clients, or twice to one; give each once")
    return [part.astype(np.int64) for part in parts]  # an empty list's are floats


def check_repeated(draw: Callable, split: Indices, config: Any) -> None:
    """Raise UserError if a user's function draws another split for the same seed.

    Then no run could be resumed.
    """
    again = draw(np.random.default_rng(config.seed))
    if not all(map(np.array_equal, split, again)):
        raise UserError(
            f"partition={config.partition_name!r:.200} gives another split on each call; draw "
            "random numbers from the generator that it gets, rng"
        )


def verify_partition_file(path: str, dataset: Any, parts: Indices) -> None:
    """Raise UserError if a partition.json says something of itself that does not hold.

    `parts` are the clients' images in it. A file that says nothing is believed.
    """
    claims = json.loads(read_bytes(expand_path(path)))
    name = f"partition_file={path!r:.100}"
    if claims.get("dataset_sha256", dataset.digest) != dataset.digest:
        other = claims.get("dataset", "of another SHA-256")
        raise UserError(
            f"{name} splits other data ({other!s:.60}); give the same --dataset, --data and "
            "--holdout"
        )
    label_counts = [
        np.bincount(dataset.train.labels[part], minlength=dataset.num_classes).tolist()
        for part in parts
    ]
    if claims.get("label_counts", label_counts) != label_counts:
        raise UserError(f"{name}: its label_counts do not match its indices; restore the file")
    kind = claims.get("partition")
    named = PARTITIONS.get(kind) if isinstance(kind, str) else None
    if claims.get("changes_images") or (named and named.change_images):
        raise UserError(
            f"{name} comes from --partition {kind!s:.40}, which also changes the images; use "
            f"--partition {kind!s:.40} with the same flags and --seed "
            f"{claims.get('seed', 0)!r:.12} to recreate it"
        )
