"""Data: the committed MNIST is MNIST, and what is not well-formed is refused with what is wrong."""

import gzip
import hashlib
import io
from pathlib import Path

import federated_learning as fl
from harness.fields import UserError

import numpy as np
import pytest
from runs import configure


def test_committed_mnist_is_the_original(mnist):
    assert mnist.original and mnist.name == "MNIST" and mnist.num_classes == 10
    assert mnist.train.images.shape == (60_000, 28, 28) and mnist.test.images.shape == (
        10_000,
        28,
        28,
    )
    published = Path(fl.__file__).with_name("data").joinpath("README.md").read_text()
    assert hashlib.sha256(mnist.train.images.tobytes()).hexdigest() in published
    # the first ten, as in every tutorial
    assert mnist.train.labels[:10].tolist() == [
        5,
        0,
        4,
        1,
        9,
        2,
        1,
        3,
        1,
        4,
    ]


def test_digits_are_scikit_learns_enlarged(digits):
    from sklearn.datasets import load_digits

    assert "not MNIST" in digits.name and not digits.original
    assert len(digits.train.labels) == 1437 and len(digits.test.labels) == 360
    small = {
        (image * 255 / 16).round().astype(np.uint8).tobytes() for image in load_digits().images
    }
    assert {image[3:27:3, 3:27:3].tobytes() for image in digits.train.images} <= small


def test_holdout_evaluates_on_training_images_alone(digits):
    held = fl.load_dataset(configure(dataset="digits", holdout=437).data)
    assert (
        len(held.train.labels) == 1000 and len(held.test.labels) == 437 and "held out" in held.name
    )
    together = np.concatenate([held.train.images, held.test.images])
    assert sorted(image.tobytes() for image in together) == sorted(
        image.tobytes() for image in digits.train.images
    )
    with pytest.raises(UserError, match="holdout=1437 leaves none"):
        fl.load_dataset(configure(dataset="digits", holdout=1437).data)


def broken_files(folder, digits):
    """name -> (bytes of the file, what the message must say of it)."""
    good = {
        "x_train": digits.train.images,
        "y_train": digits.train.labels,
        "x_test": digits.test.images,
        "y_test": digits.test.labels,
    }

    def npz(**changed):
        buffer = io.BytesIO()
        np.savez(
            buffer,
            **{key: value for key, value in {**good, **changed}.items() if value is not None},
        )
        return buffer.getvalue()

    return {
        "truncated.npz": (npz()[:-1000], "truncated"),
        "text.npz": (b"these are no arrays", "truncated, or no .npz"),
        "empty.npz": (b"", "truncated, or no .npz"),
        "keyless.npz": (npz(y_test=None), "no array y_test"),
        "float.npz": (npz(x_train=good["x_train"] / 200), "between the 256 grey levels"),
        "flat.npz": (
            npz(x_test=good["x_test"].reshape(-1, 28, 14, 2)),
            "x_test has shape (360, 28, 14, 2)",
        ),
        "short.npz": (npz(y_train=good["y_train"][:-1]), "y_train has shape (1436,)"),
        "negative.npz": (
            npz(y_test=good["y_test"].astype(np.int16) - 1),
            "no image in y_train has label -1",
        ),
        "gap.npz": (npz(y_train=np.where(good["y_train"] == 3, 4, good["y_train"])), "label 3"),
        "pickle.npz": (npz(y_test=np.array([{}] * 360, dtype=object)), "cannot be read"),
    }


def test_broken_files_are_refused_with_what_is_wrong(tmp_path, digits):
    for name, (content, message) in broken_files(tmp_path, digits).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=".") as error:
            fl.load_dataset(configure(data=str(tmp_path / name)).data)
        assert (
            message in str(error.value)
            and name in str(error.value)
            and "\n" not in str(error.value)
        )


def as_people_have_it(digits):
    """name -> the same data in another form: a dict of arrays for np.savez."""
    (x, y) = digits.train
    (u, v) = digits.test
    return {
        "channel": {
            "x_train": x[..., None],
            "y_train": y[:, None],
            "x_test": u[:, None],
            "y_test": np.eye(10)[v],
        },
        "flat": {
            "train_images": x.reshape(-1, 784),
            "train_labels": y,
            "test_images": u,
            "test_labels": v * 1.0,
        },
        "unit": {
            "x_train": (x / 255).astype(np.float32),
            "y_train": y,
            "x_test": u / 255,
            "y_test": v,
        },
        "nameless": {"arr_0": x.astype(np.int64), "arr_1": y, "arr_2": u.astype(float), "arr_3": v},
        "labelled": {"x_train": x, "y_train": y + 1, "x_test": u, "y_test": v + 1},
    }


@pytest.mark.parametrize("form", ["channel", "flat", "unit", "nameless", "labelled"])
def test_data_is_taken_as_people_have_it(tmp_path, digits, form):
    np.savez(tmp_path / "data.npz", **as_people_have_it(digits)[form])
    dataset = fl.load_dataset(configure(data=str(tmp_path / "data.npz"), data_name="mine").data)
    assert dataset.digest == digits.digest and dataset.name == "mine"
    assert bool(dataset.remarks) == (form in ("unit", "labelled"))
    assert dataset.classes == tuple(range(1, 11) if form == "labelled" else range(10))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folders_are_read(tmp_path, digits, packed):
    for part, split in (("train", digits.train), ("t10k", digits.test)):
        for kind, array in (("images-idx3", split.images), ("labels-idx1", split.labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            name = tmp_path / f"{part}-{kind}-ubyte"
            content = head + array.tobytes()
            if packed:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(content))
            else:
                name.write_bytes(content)
    assert fl.load_dataset(configure(data=str(tmp_path)).data).digest == digits.digest
    turned = fl.load_dataset(configure(data=str(tmp_path), transpose=True).data)
    assert np.array_equal(turned.train.images, digits.train.images.transpose(0, 2, 1))
    next(tmp_path.glob("t10k-labels*")).write_bytes(b"no IDX")
    with pytest.raises(UserError, match="t10k-labels"):
        fl.load_dataset(configure(data=str(tmp_path)).data)


def test_a_natural_split_is_the_owners(tmp_path, digits):
    owners = np.arange(1437) % 7 // 2  # of 0, 1, 2 some 411 images each, of 3 half as many
    arrays = {"x_train": digits.train.images, "y_train": digits.train.labels}
    arrays |= {"x_test": digits.test.images, "y_test": digits.test.labels, "client_train": owners}
    np.savez(tmp_path / "data.npz", **arrays)
    flags = {"data": str(tmp_path / "data.npz"), "partition": "natural"}
    dataset = fl.load_dataset(configure(**flags).data)
    split = fl.make_partition(dataset, configure(**flags, num_clients=4))
    assert (
        sorted(split.sizes.tolist()) == np.sort(np.bincount(owners)).tolist()
        and split.sizes[-1] == 205
    )
    assert all(len(set(owners[part])) == 1 for part in split.indices)
    with pytest.raises(UserError, match="num_clients=5 exceeds the 4 owners; choose 1..4"):
        fl.make_partition(dataset, configure(**flags, num_clients=5))
    with pytest.raises(UserError, match="needs data that say whose each image is"):
        fl.make_partition(digits, configure(dataset="digits", partition="natural"))
