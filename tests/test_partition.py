"""Data and partition: the committed MNIST is MNIST; every split is disjoint, whole, seeded and as skewed as said."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import federated_learning as fl


@pytest.fixture(scope="module")
def mnist():
    return fl.load_dataset(fl.Config())


def test_committed_mnist_is_the_original(mnist):
    assert mnist.original and mnist.name == "MNIST" and mnist.num_classes == 10
    assert mnist.train.images.shape == (60_000, 28, 28) and mnist.test.images.shape == (10_000, 28, 28)
    published = Path(fl.__file__).with_name("data").joinpath("README.md").read_text()
    assert hashlib.sha256(mnist.train.images.tobytes()).hexdigest() in published
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the first ten, as in every tutorial


def test_digits_are_scikit_learns_enlarged(digits):
    from sklearn.datasets import load_digits

    assert "not MNIST" in digits.name and not digits.original
    assert len(digits.train.labels) == 1437 and len(digits.test.labels) == 360
    small = {(image * 255 / 16).round().astype(np.uint8).tobytes() for image in load_digits().images}
    assert {image[3:27:3, 3:27:3].tobytes() for image in digits.train.images} <= small


@pytest.mark.parametrize("partition", fl.PARTITIONERS)
@pytest.mark.parametrize("num_clients", [1, 10, 1000])
def test_split_is_disjoint_covering_and_a_function_of_the_seed(mnist, partition, num_clients):
    config = fl.Config(partition=partition, num_clients=num_clients)
    split = fl.make_partition(mnist, config)
    assert len(split.parts) == num_clients and min(map(len, split.parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(split.parts)), np.arange(60_000))
    assert split.digest == fl.make_partition(mnist, config).digest
    if num_clients > 1:
        assert (
            split.digest
            != fl.make_partition(mnist, fl.Config(partition=partition, num_clients=num_clients, seed=1)).digest
        )
    for part, counts in zip(split.parts, split.counts, strict=True):
        assert np.bincount(mnist.train.labels[part], minlength=10).tolist() == counts.tolist()


def test_every_client_gets_an_image_even_with_as_many_clients_as_images(digits):
    for partition in fl.PARTITIONERS:
        split = fl.make_partition(
            digits, fl.Config(dataset="digits", partition=partition, num_clients=1437, alpha=0.01)
        )
        assert split.sizes.tolist() == [1] * 1437


def test_skew_figures_of_a_split_done_by_hand():
    alike = fl.skew(np.array([[5, 5], [5, 5]]))
    assert alike == {"mean_total_variation": 0, "effective_classes": pytest.approx(2), "size_gini": 0}
    apart = fl.skew(np.array([[9, 0], [0, 3]]))  # pooled 3/4, 1/4; distances 1/4 and 3/4; sizes 9 and 3: (9-3)/(2*12)
    assert apart == {"mean_total_variation": 0.5, "effective_classes": pytest.approx(1), "size_gini": 0.25}


def test_skew_orders_iid_dirichlet_shards(mnist):
    def distance(partition, seed):
        split = fl.make_partition(mnist, fl.Config(partition=partition, seed=seed))
        return fl.skew(split.counts)["mean_total_variation"]

    for seed in range(3):
        assert distance("iid", seed) < 0.05 < distance("dirichlet", seed) < distance("shards", seed)


def test_shards_give_each_client_two_sorted_pieces(mnist):
    split = fl.make_partition(mnist, fl.Config(partition="shards", num_clients=100))
    assert split.sizes.tolist() == [600] * 100
    assert (split.counts > 0).sum(axis=1).max() <= 4  # two pieces of 300, each within one label or across a border


def test_shards_hold_the_clients_images_and_are_reused_only_when_whole(digits, tmp_path):
    config = fl.Config(dataset="digits", num_clients=4, cache=str(tmp_path))
    split = fl.make_partition(digits, config)
    folder = fl.write_shards(digits, split, config)
    for client, part in enumerate(split.parts):
        records = np.frombuffer((folder / f"{client}.bin").read_bytes()[: -fl.FOOTER_BYTES], np.uint8).reshape(
            len(part), 785
        )
        assert np.array_equal(records[:, :784].reshape(-1, 28, 28), digits.train.images[part])
        assert np.array_equal(records[:, 784], digits.train.labels[part])
    whole, cut = folder / "0.bin", folder / "1.bin"
    before, content = whole.stat().st_mtime_ns, cut.read_bytes()
    cut.write_bytes(content[:-785])
    assert fl.write_shards(digits, split, config) == folder
    assert whole.stat().st_mtime_ns == before and cut.read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == ["0.bin", "1.bin", "2.bin", "3.bin"]
    other = fl.make_partition(digits, fl.Config(dataset="digits", num_clients=4, seed=1))
    assert fl.write_shards(digits, other, config) != folder


def test_holdout_evaluates_on_training_images_alone(digits):
    held = fl.load_dataset(fl.Config(dataset="digits", holdout=437))
    assert len(held.train.labels) == 1000 and len(held.test.labels) == 437 and "held out" in held.name
    together = np.concatenate([held.train.images, held.test.images])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in digits.train.images)
    with pytest.raises(fl.UserError, match="holdout=1437 leaves none"):
        fl.load_dataset(fl.Config(dataset="digits", holdout=1437))
