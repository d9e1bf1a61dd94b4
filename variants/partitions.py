"""Splits other than the default: by label, size, input or owner.

Each is split(labels [N], num_clients, rng, **fields) -> a list of K index arrays. `fields` are
those that choices.PARTITIONS names. What cannot be done is a UserError.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from harness.cli.fields import UserError
from harness.cli.output import warn
from harness.training.streams import open_stream

import numpy as np
import scipy.ndimage

Indices = list[np.ndarray]


def split_iid(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> Indices:
    """Shuffle and deal out: sizes differ by one at most, labels by chance only."""
    return np.array_split(rng.permutation(len(labels)), num_clients)


def split_shards(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, shards_per_client: int
) -> Indices:
    """Sort by label, cut into K * shards_per_client pieces, and deal these out at random.

    McMahan et al. 2017, section 3: the pathological non-IID split.
    """
    num_pieces = num_clients * shards_per_client
    if num_pieces > len(labels):
        raise UserError(
            f"shards_per_client={shards_per_client} of num_clients={num_clients} exceed the "
            f"{len(labels)} images; choose 1 to {len(labels) // num_clients}"
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), num_pieces)
    pieces_of_clients = rng.permutation(num_pieces).reshape(num_clients, shards_per_client)
    return [np.concatenate([pieces[piece] for piece in own]) for own in pieces_of_clients]


def split_by_capped_dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> Indices:
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
) -> Indices:
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
    """Raise UserError if a client cannot hold that many labels."""
    if wanted > num_labels:
        raise UserError(
            f"labels_per_client={wanted} exceeds the {num_labels} labels; choose 1 to {num_labels}"
        )


def split_by_lognormal_labels(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    labels_per_client: int,
    size_spread: float,
) -> Indices:
    """Give client i the labels i mod C, i + 1 mod C, ..., in sizes of a lognormal distribution.

    Li et al. 2020 split MNIST so over 1,000 clients with two labels each; their program gives each
    client five images of each of its labels, and deals out the others in proportion to draws of
    lognormal(0, 2). Theirs leaves some images out, and has test images of its own on each client.
    """
    num_labels = len(np.bincount(labels))
    check_labels(labels_per_client, num_labels)
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        holders = [
            client
            for client in range(num_clients)
            if (int(label) - client) % num_labels < labels_per_client
        ]
        if not holders:
            raise UserError(
                f"num_clients={num_clients} with labels_per_client={labels_per_client} leave "
                f"label {label} without a holder; increase one of them"
            )
        first = min(5, len(images) // len(holders))
        draws = rng.lognormal(0, size_spread, len(holders))
        rest = len(images) - first * len(holders)
        cuts = (np.cumsum(draws / draws.sum()) * rest).round().astype(np.int64)
        ends = cuts + first * np.arange(1, len(holders) + 1)
        for client, piece in zip(holders, np.split(images, ends[:-1]), strict=True):
            parts[client].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def split_by_random_labels(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, labels_per_client: int
) -> Indices:
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
            f"num_clients={num_clients} leaves label {unheld[0]} without a holder; choose at "
            f"least {num_labels} clients"
        )
    return deal_labels(labels, holders, num_clients, rng)


def deal_labels(
    labels: np.ndarray, holders: list[list[int]], num_clients: int, rng: np.random.Generator
) -> Indices:
    """Divide the images of each label evenly among its `holders`, a list of clients a label."""
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label, owners in enumerate(holders):
        pieces = np.array_split(rng.permutation(np.flatnonzero(labels == label)), len(owners))
        for owner, piece in zip(owners, pieces, strict=True):
            parts[owner].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def split_by_label(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, labels_per_client: int
) -> Indices:
    """Give every client images of exactly `labels_per_client` labels, with equally many holders per
    label.

    This is a balanced form of "#C = k" of Li et al. 2022, section 4: clients choose in random
    order, each the labels with the fewest holders that have an image left. A label's images are
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
        raise UserError(f"{reason} without a holder; choose at least {least}")
    holders: list[list[int]] = [[] for _ in images]
    held = np.zeros(len(images))
    for client in rng.permutation(num_clients):
        fewest = np.where(held < images, held, np.inf)
        for label in np.lexsort((rng.random(len(images)), fewest))[:wanted]:  # ties by chance
            holders[label].append(client)
            held[label] += 1
    if (held > images).any():
        label = int((held - images).argmax())
        needs = f"needs {held[label]:.0f} images of label {label}, which has {images[label]}"
        raise UserError(
            f"labels_per_client={wanted} for num_clients={num_clients} {needs}; choose fewer "
            "clients or labels"
        )
    return deal_labels(labels, holders, num_clients, rng)


def split_by_size(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, size_exponent: float
) -> Indices:
    """Deal out IID labels in sizes by a power law: rank r gets a share ~ r ** -size_exponent."""
    shares = np.arange(1, num_clients + 1) ** -size_exponent
    sizes = 1 + (rng.permutation(shares / shares.sum()) * (len(labels) - num_clients)).astype(
        np.int64
    )
    sizes[sizes.argmax()] += len(labels) - sizes.sum()
    return np.split(rng.permutation(len(labels)), sizes.cumsum()[:-1])


def split_by_dirichlet_size(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> Indices:
    """Deal out IID labels in sizes drawn from Dirichlet(alpha) ("q ~ Dir(beta)" of Li et al.
    2022)."""
    shares = rng.dirichlet(np.full(num_clients, alpha))
    cuts = (np.cumsum(shares)[:-1] * len(labels)).astype(np.int64)
    return np.split(rng.permutation(len(labels)), cuts)


def rotate_and_add_noise(
    images: np.ndarray, client: int, num_clients: int, seed: int, rotation: float, noise: float
):
    """Return `images` uint8[n,H,W,channels] as client 0..K-1 sees them.

    The labels stay, the inputs are others: rotated by -`rotation`..`rotation` degrees, and blurred
    by Gaussian noise of a standard deviation of 0..`noise` grey levels, both evenly spaced from the
    first client to the last. The feature skew of Li et al. 2022 is such noise alone, without
    rotation.
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


def count_tests(share: float, num_images: int) -> int:
    """Return how many of its images a client holds out; it keeps one to train on."""
    return min(round(share * num_images), num_images - 1)


def draw_tests(parts: Indices, share: float, seed: int) -> Indices:
    """Return the images that each client holds out: `share` of its own, rounded, at random.

    A client keeps at least one image to train on, so one of a single image holds out none. What is
    drawn depends on (seed, client) and the client's images.
    """
    tests = []
    for client, part in enumerate(parts):
        count = count_tests(share, len(part))
        rng = open_stream("client tests", seed, 0, client)
        tests.append(np.sort(rng.permutation(part)[:count]))
    if not any(map(len, tests)):
        raise UserError(
            f"client_test={share:g} holds out no image, as the clients have so few; choose a "
            "larger fraction or fewer clients"
        )
    return tests


def count_owners(config: Any, dataset: Any) -> Any:
    """Return the configuration with one client per owner of the data set, if num_clients is 0.

    Without owners it is 1 client, and split_by_owner raises the error.
    """
    if config.partitioning.num_clients:
        return config
    owners = dataset.owners
    return config.replace(num_clients=1 if owners is None else len(np.unique(owners)))


def split_by_owner(
    labels: np.ndarray,
    num_clients: int,
    rng: np.random.Generator,
    owner_choice: str,
    dataset: Any,
) -> Indices:
    """Give each client the images of one owner; the data set's `owners` [N] say whose each is.

    If there are fewer clients, it is those who have the most ("largest"), or some at random. They
    are sorted by their numbers of images, the largest first.
    """
    owners = dataset.owners
    if owners is None:
        raise UserError(
            "partition='natural' needs data that name the owner of each image; give an .npz with "
            "client_train"
        )
    names, owner = np.unique(owners, return_inverse=True)
    if num_clients > len(names):
        raise UserError(
            f"num_clients={num_clients} exceeds the {len(names)} owners; choose 1 to {len(names)}"
        )
    places = np.argsort(-np.bincount(owner), kind="stable")
    if owner_choice == "random":
        places = places[np.sort(rng.permutation(len(places))[:num_clients])]
    return [np.flatnonzero(owner == place) for place in places[:num_clients]]


MAX_DRAWS = 1000
SAME_DRAWS = 3  # draws with the same sizes, after which another will not differ
SILENT_SECONDS = 10


def draw_until_large(
    draw: Callable[[np.random.Generator], Indices], first: Indices, config: Any
) -> Indices:
    """Return the first split in which each client has `min_images`, of `first` and further draws.

    Further ones are draw(rng), a function of the seed. Raises UserError if none is like that, at
    once if there are too few images, or all draws have clients of the same sizes.
    """
    min_images = config.partitioning.min_images
    num_images = sum(map(len, first))
    if min_images * len(first) > num_images:
        raise UserError(
            f"min_images={min_images} for each of {len(first)} clients exceeds the {num_images} "
            f"training images; choose at most {num_images // len(first)}"
        )
    tell_at = time.monotonic() + SILENT_SECONDS
    indices = first
    seen = set()
    for attempt in range(1, MAX_DRAWS + 1):
        sizes = sorted(map(len, indices))
        seen.add(tuple(sizes))
        if sizes[0] >= min_images:
            return indices
        if attempt == MAX_DRAWS or (attempt == SAME_DRAWS and len(seen) == 1):
            break
        if time.monotonic() > tell_at:
            warn(f"redrawing the split until each client has {min_images} images")
            tell_at = math.inf
        indices = draw(open_stream("split again", config.seed, 0, attempt))
    raise UserError(
        f"min_images={min_images} was not reached in {attempt:,} draws; the last one has a client "
        f"of {sizes[0]}; choose {'a smaller minimum, ' if min_images > 1 else ''}fewer clients, or "
        "a less skewed split"
    )
