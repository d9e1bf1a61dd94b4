"""Data and partition: the committed MNIST is MNIST; every split is disjoint, whole, seeded and as
skewed as said."""

import dataclasses
from types import SimpleNamespace

import federated_learning as fl
from harness.cli.fields import UserError
from harness.reporting import captions
from harness.reporting.results import describe_partition, skew
from harness.storage.files import to_json
from harness.training import shards
from variants import choices, partitions

import numpy as np
import pytest
import tensorflow as tf
from flower_splits import flower_dirichlet, flower_labels
from reference import read_shard_file
from runs import configure

SPLITS = sorted(choices.PARTITIONS.keys() - {"file", "natural"})


@pytest.mark.parametrize("partition", SPLITS)
@pytest.mark.parametrize("num_clients", [1, 10, 1000])
def test_split_is_disjoint_covering_and_a_function_of_the_seed(mnist, partition, num_clients):
    flags = {
        "partition": partition,
        "num_clients": num_clients,
        "labels_per_client": 10 if num_clients == 1 else 2,
    }
    config = configure(**flags)
    split = fl.make_partition(mnist, config)
    assert len(split.indices) == num_clients and min(map(len, split.indices)) >= 1
    assert np.array_equal(np.sort(np.concatenate(split.indices)), np.arange(60_000))
    assert split.digest == fl.make_partition(mnist, config).digest
    if num_clients > 1:
        assert split.digest != fl.make_partition(mnist, configure(**flags, seed=1)).digest
    for part, counts in zip(split.indices, split.counts, strict=True):
        assert np.bincount(mnist.train.labels[part], minlength=10).tolist() == counts.tolist()


@pytest.mark.parametrize("partition", SPLITS)
def test_every_client_gets_an_image_even_with_as_many_clients_as_images(digits, partition):
    flags = {"alpha": 0.01, "labels_per_client": 1, "shards_per_client": 1}
    config = configure(dataset="digits", partition=partition, num_clients=1437, **flags)
    split = fl.make_partition(digits, config)
    assert split.sizes.tolist() == [1] * 1437


@pytest.mark.parametrize(
    ("clients", "labels"), [(10, 2), (100, 3), (7, 10), (1000, 2), (60_000, 1)]
)
def test_clients_hold_exactly_so_many_labels(mnist, clients, labels):
    flags = {"partition": "labels-per-client", "num_clients": clients, "labels_per_client": labels}
    split = fl.make_partition(mnist, configure(**flags))
    assert ((split.counts > 0).sum(axis=1) == labels).all() and split.sizes.sum() == 60_000
    if clients == 100:  # not the same few sets of labels over and over: of 120 sets of three
        assert len({tuple(np.flatnonzero(row)) for row in split.counts}) > 40
    # many images a piece: a label's holders have the same number of its images
    if clients * labels <= 3000:
        assert all(np.ptp(column[column > 0]) <= 1 for column in split.counts.T)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"num_clients": 10, "labels_per_client": 11},
            "labels_per_client=11 exceeds the 10 labels; choose 1 to 10",
        ),
        ({"num_clients": 3, "labels_per_client": 2}, "choose at least 4"),
        ({"num_clients": 1437, "labels_per_client": 2}, "choose fewer clients or labels"),
    ],
)
def test_impossible_numbers_of_labels_are_refused(digits, flags, message):
    with pytest.raises(UserError, match=message):
        fl.make_partition(
            digits, configure(dataset="digits", partition="labels-per-client", **flags)
        )


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_niid_benchs_splits_are_what_flowers_code_makes(mnist, seed):
    """Image for image, where the first draw leaves nobody without ten images."""
    labels = mnist.train.labels
    flags = {"seed": seed, "num_clients": 10}
    dirichlet = fl.make_partition(
        mnist, configure(partition="capped-dirichlet", alpha=0.5, **flags)
    ).indices
    two = fl.make_partition(
        mnist, configure(partition="random-labels", labels_per_client=2, **flags)
    ).indices
    for ours, theirs in (
        (dirichlet, flower_dirichlet(labels, 10, 0.5, seed)),
        (two, flower_labels(labels, 10, 2, seed)),
    ):
        assert [part.tolist() for part in ours] == [sorted(part) for part in theirs]


def skews(dataset, seeds, **flags):
    """The mean over seeds of (total variation, effective classes, Gini)."""
    partitions = [
        fl.make_partition(dataset, configure(seed=seed, num_clients=10, **flags))
        for seed in range(seeds)
    ]
    return np.mean([list(skew(partition.counts).values()) for partition in partitions], axis=0)


@pytest.mark.slow
def test_whose_dirichlet_is_how_skewed(mnist):
    """Over 30 seeds: NIID-Bench's caps make sizes alike and labels more skewed; by client, all have
    one size."""
    plain = skews(mnist, 30, partition="dirichlet", alpha=0.5)
    capped = skews(mnist, 30, partition="capped-dirichlet", alpha=0.5, min_images=10)
    assert (
        plain == pytest.approx([0.436, 5.76, 0.205], rel=0.08)
        and capped[0] > plain[0]
        and capped[2] < plain[2]
    )
    assert capped == pytest.approx([0.489, 5.05, 0.135], rel=0.08)
    by_client = skews(mnist, 3, partition="client-dirichlet", alpha=0.5)
    assert by_client[2] < 1e-4 and 0.3 < by_client[0] < 0.5
    sizes = skews(mnist, 30, partition="dirichlet-quantity", alpha=0.5)
    assert sizes[0] < 0.1 and sizes[2] > 0.4


@pytest.mark.slow
def test_dirichlet_shares_have_dirichlets_own_moments(mnist):
    """A label's shares of K clients: means 1 / K, variances (K - 1) / (K ** 2 (K alpha + 1)), over
    60 seeds x labels.

    By client it is a client's shares of the C labels, which have the same moments with C, but for
    what is used up.
    """
    for alpha in (0.1, 1.0):
        config = configure(partition="dirichlet", alpha=alpha, num_clients=5)
        counts = np.stack(
            [fl.make_partition(mnist, config.replace(seed=seed)).counts for seed in range(60)]
        )
        shares = counts / counts.sum(axis=1, keepdims=True)  # (60, K, C)
        assert shares.mean(axis=(0, 2)) == pytest.approx([1 / 5] * 5, abs=0.05)
        assert shares.var() == pytest.approx(4 / (25 * (5 * alpha + 1)), rel=0.1)
    config = configure(partition="client-dirichlet", alpha=10.0, num_clients=20)
    counts = np.concatenate(
        [fl.make_partition(mnist, config.replace(seed=seed)).counts for seed in range(3)]
    )
    assert (counts / counts.sum(axis=1, keepdims=True)).var() == pytest.approx(
        9 / (100 * 101), rel=0.2
    )


def test_iid_is_shuffled(mnist):
    """Label counts of a client of 600 images: a hypergeometric variance, n p (1 - p) (N - n) / (N -
    1) a label."""
    split = fl.make_partition(mnist, configure(partition="iid", num_clients=100))
    shares = np.bincount(mnist.train.labels) / 60_000
    expected = 600 * shares * (1 - shares) * (60_000 - 600) / 59_999
    assert split.sizes.tolist() == [600] * 100
    assert split.counts.var(axis=0).mean() == pytest.approx(expected.mean(), rel=0.15)
    assert all(np.ptp(part) > 50_000 for part in split.indices)  # from all over the file


def test_sizes_follow_the_power_law(mnist):
    split = fl.make_partition(
        mnist, configure(partition="quantity", num_clients=10, size_exponent=1.5)
    )
    ranks = np.arange(1, 11) ** -1.5
    assert np.abs(np.sort(split.sizes)[::-1] - 60_000 * ranks / ranks.sum()).max() < 15
    alike = fl.make_partition(
        mnist, configure(partition="quantity", num_clients=7, size_exponent=0)
    )
    assert np.ptp(alike.sizes) <= 7


@pytest.mark.slow
def test_features_are_shifted_by_client_and_labels_are_not(mnist, tmp_path):
    few = mnist.train.images[:6000], mnist.train.labels[:6000]
    dataset = fl.build_dataset(*few, mnist.test.images, mnist.test.labels, "mnist")

    def shards(**flags):
        config = configure(partition="feature", num_clients=3, cache=str(tmp_path), **flags)
        experiment = fl.build_experiment(config, dataset)
        partition = experiment.partition
        fl.write_shards(experiment)
        folder = experiment.shard_folder
        return [read_shard_file(folder / f"{k}.bin") for k in range(3)], partition

    turned, partition = shards(rotation=90)
    own = [dataset.train.images[part] for part in partition.indices]
    assert np.array_equal(turned[0][0], np.rot90(own[0], 1, axes=(2, 1)))
    assert np.array_equal(turned[1][0], own[1])
    assert np.array_equal(turned[2][0], np.rot90(own[2], 1, axes=(1, 2)))
    assert all(
        (labels == dataset.train.labels[part]).all()
        for (_, labels), part in zip(turned, partition.indices, strict=True)
    )
    noisy, other = shards(rotation=0, noise=40)
    assert other.digest != partition.digest  # other shard files
    # nothing is cut off at 0 or 255 within 2.5 standard deviations
    grey = (own[2] > 100) & (own[2] < 155)
    assert np.array_equal(noisy[0][0], own[0])
    added = (noisy[2][0] - own[2].astype(float))[grey]
    assert np.std(added) == pytest.approx(40, rel=0.02)


def test_a_saved_split_is_replayed(digits, tmp_path):
    first = configure(dataset="digits", num_clients=5, seed=3)
    saved = fl.make_partition(digits, first)
    path = tmp_path / "partition.json"
    path.write_text(to_json(describe_partition(fl.build_experiment(first, digits))))
    again = configure(dataset="digits", num_clients=5, partition_file=str(path))
    assert again.partition_name == "file"
    assert fl.make_partition(digits, again).digest == saved.digest
    for content, clients, message in [
        (path.read_text(), 10, "num_clients=10 differs from the 5"),
        ('{"indices": [[1, 2], [2, 3]]}', 2, "lists an image twice"),
        ('{"indices": [[1, 1437]]}', 1, "outside the 1437"),
        ('{"indices": [[1.5]]}', 1, "indices that are not integers"),
        ('{"indices": [[], [1]]}', 2, "without images"),
        ("[]", 1, "not a partition.json"),
        ("{", 1, "not a partition.json"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            fl.make_partition(digits, again.replace(num_clients=clients))
    with pytest.raises(UserError, match="No such file"):
        fl.make_partition(
            digits, configure(dataset="digits", partition_file=str(tmp_path / "none"))
        )


def test_skew_figures_of_a_split_done_by_hand():
    alike = skew(np.array([[5, 5], [5, 5]]))
    assert alike == {
        "mean_total_variation": 0,
        "effective_classes": pytest.approx(2),
        "size_gini": 0,
    }
    # pooled 3/4, 1/4; distances 1/4 and 3/4; sizes 9 and 3: (9-3)/(2*12)
    apart = skew(np.array([[9, 0], [0, 3]]))
    assert apart == {
        "mean_total_variation": 0.5,
        "effective_classes": pytest.approx(1),
        "size_gini": 0.25,
    }


def test_skew_orders_iid_dirichlet_shards(mnist):
    def distance(partition, seed):
        split = fl.make_partition(mnist, configure(partition=partition, seed=seed))
        return skew(split.counts)["mean_total_variation"]

    for seed in range(3):
        assert distance("iid", seed) < 0.05 < distance("dirichlet", seed) < distance("shards", seed)


def test_shards_give_each_client_two_sorted_pieces(mnist):
    split = fl.make_partition(mnist, configure(partition="shards", num_clients=100))
    assert split.sizes.tolist() == [600] * 100
    assert (split.counts > 0).sum(
        axis=1
    ).max() <= 4  # two pieces of 300, each within one label or across a border


def test_shards_hold_the_clients_images_and_are_reused_only_when_whole(digits, tmp_path):
    config = configure(dataset="digits", num_clients=4, cache=str(tmp_path))
    experiment = fl.build_experiment(config, digits)
    split = experiment.partition
    fl.write_shards(experiment)
    folder = experiment.shard_folder
    for client, part in enumerate(split.indices):
        images, labels = read_shard_file(folder / f"{client}.bin")
        assert np.array_equal(images, digits.train.images[part])
        assert np.array_equal(labels, digits.train.labels[part])
    whole = folder / "0.bin"
    cut = folder / "1.bin"
    before = whole.stat().st_mtime_ns
    content = cut.read_bytes()
    cut.write_bytes(content[:-786])
    fl.write_shards(experiment)
    assert whole.stat().st_mtime_ns == before and cut.read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == ["0.bin", "1.bin", "2.bin", "3.bin"]
    other = fl.build_experiment(config.replace(seed=1), digits)
    assert other.shard_folder != folder


@pytest.mark.parametrize("num_bytes", [0, 3, 8, 100])
def test_a_shard_that_ends_too_soon_is_damaged(tmp_path, num_bytes):
    images = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28, 1)
    shards.write_shard(tmp_path, 0, images, np.array([7, 8, 9]))
    shard = shards.read_shard(tmp_path, tf.constant(0, tf.int64), (28, 28, 1))
    assert np.array_equal(shard.images, images) and np.array_equal(shard.labels, [7, 8, 9])
    path = tmp_path / "0.bin"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(tf.errors.InvalidArgumentError, match="damaged shard file"):
        shards.read_shard(tmp_path, tf.constant(0, tf.int64), (28, 28, 1))


def test_more_clients_than_images_are_refused(tmp_path):
    few = {"x_train": np.zeros((4, 28, 28), np.uint8), "y_train": np.arange(4, dtype=np.uint8)}
    np.savez(tmp_path / "few.npz", **few, x_test=few["x_train"], y_test=few["y_train"])
    dataset = fl.load_dataset(configure(data=str(tmp_path / "few.npz")).data)
    with pytest.raises(
        UserError, match="num_clients=5 exceeds the 4 training images; choose 1 to 4"
    ):
        fl.make_partition(dataset, configure(num_clients=5))


def test_what_a_split_file_says_of_itself_must_hold(digits, tmp_path, monkeypatch):
    mine = choices.PARTITIONS["iid"]._replace(change_images=lambda images, *_: 255 - images)
    monkeypatch.setitem(choices.PARTITIONS, "mine", mine)
    path = tmp_path / "partition.json"
    config = configure(dataset="digits", num_clients=5)
    said = describe_partition(fl.build_experiment(config, digits))
    for change, message in [
        ({"dataset_sha256": "00"}, "splits other data"),
        ({"label_counts": [[1] * 10] * 5}, "label_counts do not match its indices"),
        ({"partition": "feature"}, "which also changes the images"),
        ({"partition": "mine"}, "comes from --partition mine, which also changes the images"),
        ({"changes_images": True}, "which also changes the images"),
    ]:
        path.write_text(to_json({**said, **change}))
        with pytest.raises(UserError, match=message):
            fl.make_partition(digits, config.replace(partition_file=str(path)))
    path.write_text(to_json({"indices": said["indices"]}))  # another program's, which says nothing
    assert fl.make_partition(digits, config.replace(partition_file=str(path))).sizes.sum() == 1437


def test_a_least_number_of_images_is_drawn_for_or_refused(digits):
    config = configure(dataset="digits", num_clients=10, alpha=0.3)
    assert fl.make_partition(digits, config).sizes.min() < 60
    again = config.replace(min_images=60)
    assert fl.make_partition(digits, again).sizes.min() >= 60
    assert fl.make_partition(digits, again).digest == fl.make_partition(digits, again).digest
    with pytest.raises(UserError, match="min_images=140 was not reached in 1,000 draws"):
        fl.make_partition(digits, config.replace(min_images=140))
    skewed = fl.make_partition(digits, configure(dataset="digits", num_clients=100, alpha=0.001))
    assert 50 < skewed.num_filled_clients <= (skewed.sizes == 1).sum()
    with pytest.raises(
        UserError, match="shards_per_client=20 of num_clients=100 .* choose 1 to 14"
    ):
        fl.make_partition(
            digits,
            configure(dataset="digits", partition="shards", num_clients=100, shards_per_client=20),
        )


def test_sizes_that_cannot_be_are_refused_at_once(digits):
    """More images than there are; or a split whose sizes are the same in every draw."""
    config = configure(dataset="digits", num_clients=10)
    with pytest.raises(UserError, match="exceeds the 1437 training images; choose at most 1"):
        fl.make_partition(digits, config.replace(min_images=144))
    drawn = []

    def draw(rng):
        drawn.append(rng)
        return np.split(rng.permutation(10), [3])

    with pytest.raises(UserError, match="min_images=4 was not reached in 3 draws; the last"):
        partitions.draw_until_large(draw, draw(np.random.default_rng(0)), configure(min_images=4))
    assert len(drawn) == 3


OWN = """
import numpy as np

def first_is_disjoint(labels, num_clients, rng):
    is_first = rng.random() == np.random.default_rng(0).random()
    order = rng.permutation(len(labels))
    return order[:100], order[100 if is_first else 99 :]
"""


def test_each_draw_of_a_custom_split_is_checked(digits, tmp_path, monkeypatch):
    """Those for min_images, too, which the first draw here does not reach."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    own = "own.py:first_is_disjoint"
    config = configure(dataset="digits", partition=own, num_clients=2)
    assert fl.make_partition(digits, config).sizes.tolist() == [100, 1337]
    with pytest.raises(UserError, match="gives an image to two clients"):
        fl.make_partition(digits, config.replace(min_images=200))


def test_a_given_partition_is_of_the_configurations_clients_and_data(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    config = fl.Config().replace(dataset="digits", model="mlp")
    of_file = config.replace(partition="own.py:first_is_disjoint", num_clients=2)  # relative
    split = fl.make_partition(digits, of_file)
    assert fl.build_experiment(of_file, digits, split).partition is split
    own = fl.make_partition(digits, config)
    assert fl.build_experiment(config, digits, own).partition is own
    with pytest.raises(UserError, match="another split than dirichlet of this .* index arrays"):
        fl.build_experiment(config.replace(alpha=5), digits, own)
    given = fl.build_experiment(config.replace(alpha=5), digits, own.indices)
    assert given.partition.digest == own.digest and given.config.partition_name == "file"
    for other, said in (
        (config.replace(num_clients=5), "partition= has 5 clients, but num_clients=10"),
        (config.replace(client_test=0.5), "partition= holds out 7.. images .* client_test=0 of"),
        (config.replace(partition="feature"), "made for other data, or for changed images"),
    ):
        with pytest.raises(UserError, match=said):
            fl.build_experiment(config, digits, fl.make_partition(digits, other))
    half = config.replace(client_test=0.5)
    for split in (own, fl.make_partition(digits, config.replace(client_test=0.2))):
        with pytest.raises(UserError, match="which is not client_test=0.5 of each"):
            fl.build_experiment(half, digits, split)
    halved = fl.make_partition(digits, half)
    assert fl.build_experiment(half, digits, halved).partition is halved


def test_all_owners_are_clients_however_natural_is_chosen(tmp_path):
    file = tmp_path / "natural.toml"
    file.write_text('partition = "natural"\n')
    natural = [fl.parse("--partition natural"), fl.Config().replace(partition="natural")]
    natural += [fl.parse(f"--config {file}")]
    assert [config.partitioning.num_clients for config in natural] == [0, 0, 0]
    file.write_text("num_clients = 10\n")  # the default, but asked for
    config = fl.parse(f"--config {file} --partition natural")
    assert config.partitioning.num_clients == 10
    file.write_text("num_clients = 50\n")
    few = fl.parse(f"--config {file} --partition natural")
    fewer = fl.Config().replace(partition="natural", num_clients=5).replace(seed=1)
    assert (few.partitioning.num_clients, fewer.partitioning.num_clients) == (50, 5)


def test_a_natural_split_has_all_owners_unless_fewer_are_asked_for(digits):
    owners = np.arange(len(digits.train.labels)) % 23
    data = dataclasses.replace(digits, owners=owners)
    everyone = fl.build_experiment(fl.parse("--dataset digits --partition natural"), data)
    assert len(everyone.partition.sizes) == everyone.config.partitioning.num_clients == 23
    assert everyone.config.cohort_size == 23
    drawn = fl.build_experiment(fl.parse("--partition natural --owner-choice random"), data)
    assert any("as all 23 owners are clients" in notice for notice in drawn.notices)
    assert "at random" not in captions.caption(drawn)
    some = fl.parse("--dataset digits --partition natural --num-clients 5")
    assert len(fl.build_experiment(some, data).partition.sizes) == 5
    with pytest.raises(UserError, match="clients_per_round=24 exceeds num_clients=23"):
        fl.build_experiment(fl.parse("--partition natural --clients-per-round 24"), data)
    with pytest.raises(UserError, match="needs data that name the owner of each image"):
        fl.build_experiment(fl.parse("--dataset digits --partition natural"), digits)


def test_owners_at_random_are_a_part_of_them_and_a_function_of_the_seed():
    """Owner o has o + 1 images: the largest five are 9, 8, 7, 6, 5; at random they are others."""
    owners = np.repeat(np.arange(10), np.arange(1, 11))
    labels = np.zeros(len(owners), np.uint8)

    def sizes(choice, seed):
        rng = np.random.default_rng(seed)
        parts = partitions.split_by_owner(labels, 5, rng, choice, SimpleNamespace(owners=owners))
        assert all(len(set(owners[part])) == 1 for part in parts)
        return [len(part) for part in parts]

    assert sizes("largest", 0) == sizes("largest", 1) == [10, 9, 8, 7, 6]
    drawn = [sizes("random", seed) for seed in range(200)]
    assert drawn[3] == sizes("random", 3) and all(one == sorted(one)[::-1] for one in drawn)
    often = np.bincount(np.concatenate(drawn), minlength=11)[1:] / 200  # each owner in half of them
    assert often == pytest.approx([0.5] * 10, abs=4 * 0.5 / np.sqrt(200))


def test_lognormal_labels_are_fedproxs(mnist):
    """1,000 clients: client i holds i mod 10 and i + 1 mod 10, five images of each at least. With
    20 clients each label has 4 holders: the logarithms of their images beyond five, less the mean
    of the four, spread by 2 * sqrt(3 / 4)."""
    flags = {"partition": "lognormal-labels", "num_clients": 1000}
    split = fl.make_partition(mnist, configure(**flags))
    for client, counts in enumerate(split.counts):
        held = {client % 10, (client + 1) % 10}
        assert set(np.flatnonzero(counts)) == held and min(counts[list(held)]) >= 5
    labels = np.repeat(np.arange(10), 6000)
    deviations = []
    for seed in range(60):
        parts = partitions.split_by_lognormal_labels(labels, 20, np.random.default_rng(seed), 2, 2)
        counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        for label in range(10):
            logs = np.log(np.maximum(counts[:, label][counts[:, label] > 0] - 5, 0.5))
            deviations.extend(logs - logs.mean())
    assert np.std(deviations) == pytest.approx(2 * np.sqrt(3 / 4), rel=0.04)
    even = fl.make_partition(mnist, configure(**flags, size_spread=0))
    for label in range(10):
        assert np.ptp(even.counts[:, label][even.counts[:, label] > 0]) <= 1
    with pytest.raises(UserError, match="leave label 4 without a holder"):
        fl.make_partition(mnist, configure(**flags | {"num_clients": 3}))


def test_indices_are_those_of_all_training_images(digits, tmp_path):
    """Of a run with images held out too, so that another program splits alike."""
    config = configure(dataset="digits", holdout=200, num_clients=5)
    dataset = fl.load_dataset(config.data)
    experiment = fl.build_experiment(config, dataset)
    said = describe_partition(experiment)
    for client, indices in enumerate(said["indices"]):
        own = dataset.train.images[experiment.partition.indices[client]]
        assert {image.tobytes() for image in digits.train.images[indices]} == {
            image.tobytes() for image in own
        }
    path = tmp_path / "partition.json"
    path.write_text(to_json(said))
    again = fl.make_partition(dataset, config.replace(partition_file=str(path)))
    assert again.digest == experiment.partition.digest
    path.write_text(to_json({"indices": said["indices"]}))  # another program's
    whole = fl.make_partition(digits, config.replace(holdout=0, partition_file=str(path)))
    assert [part.tolist() for part in whole.indices] == [sorted(i) for i in said["indices"]]
    everything = np.array_split(np.arange(1437), 5)
    path.write_text(to_json({"indices": [part.tolist() for part in everything]}))
    left = fl.make_partition(dataset, config.replace(partition_file=str(path)))
    for client, part in enumerate(everything):
        kept = np.sort(dataset.places[left.indices[client]])
        assert kept.tolist() == np.intersect1d(part, dataset.places).tolist()
    path.write_text(to_json({"indices": [[int(np.setdiff1d(range(1437), dataset.places)[0])]] * 1}))
    with pytest.raises(UserError, match="all images of client 0 are held out"):
        fl.make_partition(dataset, config.replace(partition_file=str(path), num_clients=1))


def test_sizes_by_dirichlet_have_its_variance():
    """Of two clients one's share is Beta(a, a), of mean 1/2 and variance 1 / (4 (2 a + 1))."""
    labels = np.zeros(1000, np.uint8)
    for alpha in (0.5, 2.0):
        shares = [
            len(partitions.split_by_dirichlet_size(labels, 2, np.random.default_rng(s), alpha)[0])
            / 1000
            for s in range(2000)
        ]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_a_clients_own_mix_decides_which_label_it_takes():
    """Label 0 has 900 images and label 1 has 100, two clients 500 each. While both labels last, a
    client takes label 1 in proportion to its mix, however few of it are left: so after all, the
    100 are shared as the mixes have it, which the same draws show."""
    labels = np.repeat([0, 1], [900, 100]).astype(np.uint8)
    for seed in range(20):
        parts = partitions.split_by_client_dirichlet(labels, 2, np.random.default_rng(seed), 1.0)
        rng = np.random.default_rng(seed)
        for label in (0, 1):
            rng.permutation(np.flatnonzero(labels == label))
        mixes = rng.dirichlet([1.0, 1.0], 2)
        turns = rng.permutation(np.repeat([0, 1], 500))
        left = [900, 100]
        taken = [[0, 0], [0, 0]]
        for client, chance in zip(turns, rng.random(1000), strict=True):
            takes_0 = chance < mixes[client][0]
            if left[0] == 0 or left[1] == 0:
                takes_0 = left[1] == 0
            label = 0 if takes_0 else 1
            taken[client][label] += 1
            left[label] -= 1
        counts = [np.bincount(labels[part], minlength=2).tolist() for part in parts]
        assert counts == taken
