"""Splits beside IID, shards and Dirichlet: by label, by size, by input, and a saved split of
another run or program.

Each is split(labels uint8[N], num_clients, rng, **flags) -> a list of K index arrays, the flags
being fields of the configuration by their names. What cannot be is a UserError.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from harness.fields import UserError
from harness.files import DAMAGE, place, read_bytes

import numpy as np
import scipy.ndimage

Parts = list[np.ndarray]


class Partitioner(NamedTuple):
    """A row: split(labels, num_clients, rng, **flags) -> K index arrays; `title` is for the plots.

    `flags` are the fields of the configuration that it uses. shift(images, client, num_clients,
    seed, **shift_flags), where there is one, changes a client's images before they go into its
    shard.
    """

    title: str
    split: Callable[..., Parts]
    flags: tuple[str, ...] = ()
    shift: Callable[..., np.ndarray] | None = None
    shift_flags: tuple[str, ...] = ()
    natural: bool = False  # split also gets `owners`, whose each training image is, or None


def caption(row: Partitioner, fields: dict[str, Any]) -> str:
    """Return what a caption says of the split."""
    least = fields["min_images"]
    return row.title.format(**fields) + (f", {least} images a client at least" if least else "")


def split_by_capped_dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> Parts:
    """Split each label by Dirichlet(alpha), but give a client with N / K images nothing more.

    This is "p_k ~ Dir(beta)" as NIID-Bench's own program does it (utils.py, `noniid-labeldir`), and
    Flower's niid_bench after it, whose split is that of seed 42; both draw again until every client
    has 10 images (`min_images`).
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    sizes = np.zeros(num_clients, np.int64)
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha)) * (sizes < len(labels) / num_clients)
        if not shares.sum() > 0:  # alpha is so small that all of the label went to full clients
            shares = (sizes < len(labels) / num_clients).astype(np.float64)
        cuts = (np.cumsum(shares / shares.sum())[:-1] * len(images)).astype(np.int64)
        for client, piece in enumerate(np.split(images, cuts)):
            parts[client].append(piece)
            sizes[client] += len(piece)
    return [np.concatenate(pieces) for pieces in parts]


def split_by_client_dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> Parts:
    """Let each client draw its own label mix from Dirichlet(alpha, ..., alpha); all have one size.

    Hsu et al. 2019, section 3.1, whose alpha is the sum of these parameters (C times ours), as
    FedDyn's program does it ("balanced"): a client drawn at random takes one image of a label drawn
    from its mix, among the labels that have images left, until all clients are full.
    """
    classes = np.unique(labels)
    stock = [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in classes]
    mixes = rng.dirichlet(np.full(len(classes), alpha), num_clients)  # (K, C)
    sizes = [len(part) for part in np.array_split(labels, num_clients)]
    turns = rng.permutation(np.repeat(np.arange(num_clients), sizes))
    left = np.array([len(images) for images in stock])
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for client, chance in zip(turns.tolist(), rng.random(len(labels)).tolist(), strict=True):
        odds = mixes[client] * (left > 0)
        if not odds.sum() > 0:  # nothing is left of any label of its mix
            odds = left
        heights = np.cumsum(odds)
        place = int(np.searchsorted(heights, chance * heights[-1], side="right"))
        parts[client].append(stock[place].pop())
        left[place] -= 1
    return [np.array(part, np.int64) for part in parts]


def check_labels(wanted: int, num_labels: int) -> None:
    """Raise UserError where a client cannot hold so many labels."""
    if wanted > num_labels:
        raise UserError(
            f"labels_per_client={wanted} exceeds the {num_labels} labels; choose 1..{num_labels}"
        )


def split_by_random_labels(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, labels_per_client: int
) -> Parts:
    """Give client i the label i mod C and `labels_per_client` - 1 others at random.

    This is "#C = k" as NIID-Bench's own program does it (utils.py, `noniid-#label2`), and Flower's
    niid_bench after it, whose split is that of seed 42. A label's images are divided evenly among
    its holders, of which one label may have many more than another.
    """
    num_labels = len(np.bincount(labels))
    check_labels(labels_per_client, num_labels)
    holders: list[list[int]] = [[] for _ in range(num_labels)]
    for client in range(num_clients):
        held = [client % num_labels]
        while len(held) < labels_per_client:
            label = int(rng.choice(num_labels, 1)[0])
            if label not in held:
                held.append(label)
        for label in held:
            holders[label].append(client)
    unheld = [label for label, owners in enumerate(holders) if not owners]
    if unheld:
        raise UserError(
            f"num_clients={num_clients} leaves label {unheld[0]} to nobody; choose at least "
            f"{num_labels} clients"
        )
    return deal_labels(labels, holders, num_clients, rng)


def deal_labels(
    labels: np.ndarray, holders: list[list[int]], num_clients: int, rng: np.random.Generator
) -> Parts:
    """Divide the images of each label evenly among its `holders`, a list of clients a label."""
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label, owners in enumerate(holders):
        pieces = np.array_split(rng.permutation(np.flatnonzero(labels == label)), len(owners))
        for owner, piece in zip(owners, pieces, strict=True):
            parts[owner].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def split_by_label(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, labels_per_client: int
) -> Parts:
    """Give every client images of exactly `labels_per_client` labels, and every label as many
    holders.

    A balanced form of the "#C = k" of Li et al. 2022, section 4: clients choose in a random order,
    each the labels that have the fewest holders so far, and an image left. A label's images are
    divided evenly among its holders.
    """
    wanted = labels_per_client
    images = np.bincount(labels)
    check_labels(wanted, len(images))
    if wanted * num_clients < len(images):
        least = -(-len(images) // num_clients)
        reason = (
            f"labels_per_client={wanted} of num_clients={num_clients} leave some of the "
            f"{len(images)} labels"
        )
        raise UserError(f"{reason} to nobody; choose at least {least}")
    holders: list[list[int]] = [[] for _ in images]
    held = np.zeros(len(images))
    for client in rng.permutation(num_clients):
        fewest = np.where(held < images, held, np.inf)
        for label in np.lexsort((rng.random(len(images)), fewest))[:wanted]:  # ties by chance
            holders[label].append(client)
            held[label] += 1
    if (held > images).any():
        label = int((held - images).argmax())
        needs = f"needs {held[label]:.0f} images of label {label}, of {images[label]}"
        raise UserError(
            f"labels_per_client={wanted} for num_clients={num_clients} {needs}; choose fewer "
            "clients or labels"
        )
    return deal_labels(labels, holders, num_clients, rng)


def split_by_size(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, size_exponent: float
) -> Parts:
    """Deal out IID labels in sizes by a power law: the client of rank r gets a share ~ r **
    -size_exponent."""
    shares = np.arange(1, num_clients + 1) ** -size_exponent
    sizes = 1 + (rng.permutation(shares / shares.sum()) * (len(labels) - num_clients)).astype(
        np.int64
    )
    sizes[sizes.argmax()] += len(labels) - sizes.sum()
    return np.split(rng.permutation(len(labels)), sizes.cumsum()[:-1])


def split_by_dirichlet_size(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> Parts:
    """Deal out IID labels in sizes drawn from Dirichlet(alpha) ("q ~ Dir(beta)" of Li et al.
    2022)."""
    shares = rng.dirichlet(np.full(num_clients, alpha))
    cuts = (np.cumsum(shares)[:-1] * len(labels)).astype(np.int64)
    return np.split(rng.permutation(len(labels)), cuts)


def split_alike(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> Parts:
    """Deal out IID, as the clients differ by their inputs."""
    return np.array_split(rng.permutation(len(labels)), num_clients)


def shift_features(
    images: np.ndarray, client: int, num_clients: int, seed: int, rotation: float, noise: float
):
    """Return `images` uint8[n,28,28] as client 0..K-1 sees them: the same labels, other inputs.

    They are rotated by -`rotation`..`rotation` degrees and blurred by Gaussian noise of a standard
    deviation of 0..`noise` grey levels, both evenly spaced from the first client to the last. The
    feature skew of Li et al. 2022 is such noise alone, without rotation.
    """
    place = client / max(num_clients - 1, 1)
    angle = (2 * place - 1) * rotation
    spread = place * noise
    turned = (
        scipy.ndimage.rotate(images, angle, axes=(1, 2), reshape=False, order=1)
        if angle
        else images
    )
    rng = np.random.default_rng([seed, client])
    return (
        (turned + spread * rng.standard_normal(turned.shape)).round().clip(0, 255).astype(np.uint8)
    )


def read_split(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, partition_file: str
) -> Parts:
    """Return the split in a partition.json of a run or of another program: `indices`, a list a
    client."""
    named = f"partition_file={partition_file!r:.100}"
    try:
        parts = [
            np.array(part) for part in json.loads(read_bytes(place(partition_file)))["indices"]
        ]
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or "not a partition.json with a list `indices`"
        raise UserError(
            f"{named} cannot be read ({reason}); give the partition.json of a run"
        ) from error
    if len(parts) != num_clients:
        raise UserError(
            f"num_clients={num_clients} differs from the {len(parts)} of {named}; choose "
            f"{len(parts)}"
        )
    if any(part.ndim != 1 or part.dtype != np.int64 or len(part) == 0 for part in parts):
        raise UserError(
            f"{named} has a client without images or with other things than whole numbers; mend "
            "the file"
        )
    every = np.concatenate(parts)
    if every.min() < 0 or every.max() >= len(labels) or len(np.unique(every)) != len(every):
        raise UserError(
            f"{named} names an image twice, or one that is not among the {len(labels)}; mend the "
            "file"
        )
    return parts


def split_by_owner(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, owners: np.ndarray | None
) -> Parts:
    """Give each client the images of one owner, those who have the most first; `owners` [N] says
    whose each is."""
    if owners is None:
        raise UserError(
            "partition='natural' needs data that say whose each image is; give an .npz with "
            "client_train"
        )
    names, owner = np.unique(owners, return_inverse=True)
    if num_clients > len(names):
        raise UserError(
            f"num_clients={num_clients} exceeds the {len(names)} owners; choose 1..{len(names)}"
        )
    largest = np.argsort(-np.bincount(owner), kind="stable")[:num_clients]
    return [np.flatnonzero(owner == place) for place in largest]


DRAWS = 1000


def draw_split(draw: Callable, seed: int, min_images: int) -> tuple[Parts, int]:
    """Return (a split, how many clients were given an image, as they had got none).

    draw(rng) draws one; with `min_images` again and again until each client has so many, a function
    of the seed.
    """
    parts = draw(np.random.default_rng(seed))
    for attempt in range(1, DRAWS):
        if min(map(len, parts)) >= min_images:
            return fill_empty(parts)
        parts = draw(np.random.default_rng([seed, 0, 3, attempt]))
    raise UserError(
        f"min_images={min_images} is not reached by any of {DRAWS} draws, the last of which has a "
        f"client of {min(map(len, parts))}; choose less, fewer clients, or a less skewed split"
    )


def fill_empty(parts: Parts) -> tuple[Parts, int]:
    """Give each client that got nothing an image of the one that has the most: without data nobody
    takes part."""
    sizes = np.array([len(part) for part in parts])
    empty = np.flatnonzero(sizes == 0)
    for client in empty:
        donor = int(sizes.argmax())
        parts[client] = parts[donor][-1:]
        parts[donor] = parts[donor][:-1]
        sizes[client] = 1
        sizes[donor] = sizes[donor] - 1
    return parts, len(empty)


def remark(filled: int, images: int, sizes: np.ndarray) -> list[str]:
    """Return what the user should know of a split of `images` training images into `sizes`
    int64[K]."""
    remarks = []
    if filled:
        remarks.append(
            f"{filled} of {len(sizes)} clients got no image and were given one; --min-images draws "
            "again"
        )
    if sizes.sum() < images:
        remarks.append(f"{images - sizes.sum():,} of {images:,} training images are no client's")
    return remarks


def check_claims(partition_file: str, digest: str, counts: np.ndarray) -> None:
    """Raise UserError where what a partition.json says of itself does not hold; one that says
    nothing is believed.

    `digest` is that of the data set, `counts` int64[K,C] the label counts of the split.
    """
    said = json.loads(read_bytes(place(partition_file)))
    named = f"partition_file={partition_file!r:.100}"
    if said.get("dataset_sha256", digest) != digest:
        raise UserError(
            f"{named} is a split of other data "
            f"({said.get('dataset', 'of another SHA-256')!s:.60}); give the same --dataset, --data "
            "and --holdout"
        )
    if said.get("label_counts", counts.tolist()) != counts.tolist():
        raise UserError(f"{named}: its label_counts are not those of its indices; restore the file")
    if said.get("partition") == "feature":
        raise UserError(
            f"{named} is of --partition feature, whose images were changed beside the split; give "
            f"--partition feature with the same flags and --seed {said.get('seed', 0)!r:.12}, "
            "which makes it again"
        )


ROWS = {
    "labels-per-client": Partitioner(
        "{labels_per_client} labels a client", split_by_label, ("labels_per_client",)
    ),
    "random-labels": Partitioner(
        "{labels_per_client} labels a client, at random",
        split_by_random_labels,
        ("labels_per_client",),
    ),
    "capped-dirichlet": Partitioner(
        "Dirichlet({alpha:g}), sizes capped", split_by_capped_dirichlet, ("alpha",)
    ),
    "client-dirichlet": Partitioner(
        "Dirichlet({alpha:g}) by client, equal sizes", split_by_client_dirichlet, ("alpha",)
    ),
    "dirichlet-quantity": Partitioner(
        "sizes by Dirichlet({alpha:g})", split_by_dirichlet_size, ("alpha",)
    ),
    "quantity": Partitioner(
        "sizes by power law ({size_exponent:g})", split_by_size, ("size_exponent",)
    ),
    "feature": Partitioner(
        "IID, rotated by ±{rotation:g}°, noise to {noise:g}",
        split_alike,
        (),
        shift_features,
        ("rotation", "noise"),
    ),
    "natural": Partitioner("natural, by owner", split_by_owner, natural=True),
    "file": Partitioner("split of a file", read_split, ("partition_file",)),
}
