"""Splits other than the default: by label, size, input or owner, and from a file.

Each is split(labels uint8[N], num_clients, rng, **fields) -> a list of K index arrays. `fields` are
those that choices.PARTITIONS names. What cannot be done is a UserError.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

from harness.cli.fields import UserError
from harness.cli.output import warn
from harness.storage.files import expand_path, io_errors_as_user_errors, read_bytes, write_file
from harness.training import shards
from harness.training.streams import open_stream
from variants.choices import PARTITIONS

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
    """Raise UserError for a Partition of other clients or data than those of a configuration."""
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


def check_own_split(draw: Callable, split: Any, labels: np.ndarray, config: Any) -> None:
    """Raise UserError if a user's function returned no split: K disjoint arrays of indices.

    `draw` draws it again, to see that it is a function of the seed: else no run can be resumed.
    """
    source = f"partition={config.partition_name!r:.200}"
    num_clients = config.partitioning.num_clients
    try:
        parts = [np.asarray(part) for part in split]
    except TypeError as error:
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
    if not every.size:
        raise UserError(f"{source} gives no image to any client; return the images' indices")
    if every.min() < 0 or every.max() >= len(labels):
        raise UserError(f"{source} returns indices outside 0 to {len(labels) - 1}; return those")
    if len(np.unique(every)) != len(every):
        raise UserError(f"{source} gives an image to two clients, or twice to one; give each once")
    again = draw(np.random.default_rng(config.seed))
    if len(again) != len(parts) or not all(map(np.array_equal, parts, again)):
        raise UserError(
            f"{source} gives another split on each call; draw random numbers from the generator "
            "that it gets, rng"
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
