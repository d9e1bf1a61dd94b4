"""Splits beside IID, shards and Dirichlet: by label, by size, by input, and a saved split of another run or program."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage


def split_by_label(labels: np.ndarray, config: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """Every client gets images of exactly `labels_per_client` labels (the "#C = k" of Li et al. 2022, section 4).

    Clients choose in a random order, each the labels that have the fewest holders so far, and an image left. A label's
    images are divided evenly among its holders. Raises ValueError where that cannot be.
    """
    wanted, clients = config.labels_per_client, config.num_clients
    images = np.bincount(labels)
    if wanted > len(images):
        raise ValueError(f"labels_per_client={wanted} exceeds the {len(images)} labels; choose 1..{len(images)}")
    if wanted * clients < len(images):
        raise ValueError(f"labels_per_client={wanted} of num_clients={clients} leave some of the {len(images)} labels "
                         f"to nobody; choose at least {-(-len(images) // clients)}")  # fmt: skip
    holders: list[list[int]] = [[] for _ in images]
    held = np.zeros(len(images))
    for client in rng.permutation(clients):
        fewest = np.where(held < images, held, np.inf)
        for label in np.lexsort((rng.random(len(images)), fewest))[:wanted]:  # ties by chance
            holders[label].append(client)
            held[label] += 1
    if (held > images).any():
        label = int((held - images).argmax())
        raise ValueError(f"labels_per_client={wanted} for num_clients={clients} needs {held[label]:.0f} images of "
                         f"label {label}, of {images[label]}; choose fewer clients or labels")  # fmt: skip
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, owners in enumerate(holders):
        for owner, piece in zip(
            owners, np.array_split(rng.permutation(np.flatnonzero(labels == label)), len(owners)), strict=True
        ):
            parts[owner].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def split_by_size(labels: np.ndarray, config: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """IID labels, sizes by a power law: the client of rank r holds a share proportional to r ** -size_exponent."""
    shares = np.arange(1, config.num_clients + 1) ** -config.size_exponent
    sizes = 1 + (rng.permutation(shares / shares.sum()) * (len(labels) - config.num_clients)).astype(np.int64)
    sizes[sizes.argmax()] += len(labels) - sizes.sum()
    return np.split(rng.permutation(len(labels)), sizes.cumsum()[:-1])


def shift_features(images: np.ndarray, client: int, config: Any) -> np.ndarray:
    """`images` uint8[n,28,28] as client 0..K-1 sees them: the same labels, other inputs (Li et al. 2022, section 4).

    They are rotated by -`rotation`..`rotation` degrees and blurred by Gaussian noise of a standard deviation of
    0..`noise` grey levels, both evenly spaced from the first client to the last.
    """
    place = client / max(config.num_clients - 1, 1)
    angle, spread = (2 * place - 1) * config.rotation, place * config.noise
    turned = scipy.ndimage.rotate(images, angle, axes=(1, 2), reshape=False, order=1) if angle else images
    rng = np.random.default_rng([config.seed, client])
    return (turned + spread * rng.standard_normal(turned.shape)).round().clip(0, 255).astype(np.uint8)


def read_split(labels: np.ndarray, config: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """The split in `partition_file`, a partition.json of a run or of another program: `indices`, a list a client.

    Raises ValueError where it is not a split of these training images over num_clients clients.
    """
    path = Path(config.partition_file).expanduser()
    named = f"partition_file={str(path)!r}"
    try:
        parts = [np.array(part) for part in json.loads(path.read_text())["indices"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "not a partition.json with a list `indices`"
        raise ValueError(f"{named} cannot be read ({reason}); give the partition.json of a run") from error
    if len(parts) != config.num_clients:
        raise ValueError(f"num_clients={config.num_clients} differs from the {len(parts)} of {named}; "
                         f"choose {len(parts)}")  # fmt: skip
    if any(part.ndim != 1 or part.dtype != np.int64 or len(part) == 0 for part in parts):
        raise ValueError(f"{named} has a client without images or with other things than whole numbers; mend the file")
    every = np.concatenate(parts)
    if every.min() < 0 or every.max() >= len(labels) or len(np.unique(every)) != len(every):
        raise ValueError(f"{named} names an image twice, or one that is not among the {len(labels)}; mend the file")
    return parts
