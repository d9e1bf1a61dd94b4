"""Data: the committed MNIST is MNIST, and what is not well-formed is refused with what is wrong."""

import gzip
import hashlib
import io
import os
import time
from pathlib import Path

import federated_learning as fl
from harness.cli.fields import UserError
from variants import canonical, idx

import numpy as np
import pytest
from runs import configure


def test_committed_mnist_is_the_original(mnist):
    assert mnist.is_mnist and mnist.name == "MNIST" and mnist.num_classes == 10
    assert mnist.train.images.shape == (60_000, 28, 28, 1) and mnist.test.images.shape == (
        10_000,
        28,
        28,
        1,
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

    assert "not MNIST" in digits.name and not digits.is_mnist
    assert len(digits.train.labels) == 1437 and len(digits.test.labels) == 360
    small = {
        (image * 255 / 16).round().astype(np.uint8).tobytes() for image in load_digits().images
    }
    assert {image[3:27:3, 3:27:3, 0].tobytes() for image in digits.train.images} <= small


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
        "text.npz": (b"these are no arrays", "truncated, or not an .npz"),
        "empty.npz": (b"", "truncated, or not an .npz"),
        "keyless.npz": (npz(y_test=None), "no array y_test"),
        "float.npz": (
            npz(x_train=good["x_train"] / 200),
            "rounding it to grey levels would lose information",
        ),
        "flat.npz": (
            npz(x_test=good["x_test"].reshape(-1, 28, 14, 2)),
            "x_test has shape (360, 28, 14, 2)",
        ),
        "short.npz": (npz(y_train=good["y_train"][:-1]), "y_train has shape (1436,)"),
        "negative.npz": (
            npz(y_test=good["y_test"].astype(np.int16) - 1),
            "y_test: 36 of 360 labels are -1, which stands for unlabelled",
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
            "x_train": x,
            "y_train": y[:, None],
            "x_test": u.reshape(-1, 1, 28, 28),
            "y_test": np.eye(10)[v],
        },
        "flat": {
            "train_images": x.reshape(-1, 784),
            "train_labels": y,
            "test_images": u[..., 0],
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
    assert bool(dataset.notices) == (form in ("unit", "labelled"))
    assert dataset.classes == tuple(range(1, 11) if form == "labelled" else range(10))


def colours(seed, n=40, shape=(12, 9, 3), num_labels=4):
    """Random images uint8[n,12,9,3], and labels 0..3."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape)).astype(np.uint8), np.arange(n) % num_labels


def load_npz(path, validation=False, **arrays):
    np.savez(path, **arrays)
    return fl.load_dataset(configure(data=str(path), validation=validation).data)


def test_images_of_any_size_and_colour_are_taken_in_every_usual_form(tmp_path):
    """Channels last, first (PyTorch), and before the number (SVHN's Matlab files, labels from 1);
    in 0..1, and in -1..1."""
    x, y = colours(0)
    u, v = colours(1, 20)
    first = {"x_train": x.transpose(0, 3, 1, 2), "x_test": u.transpose(0, 3, 1, 2)}
    last = {"x_train": x.transpose(1, 2, 3, 0), "x_test": u.transpose(1, 2, 3, 0)}
    unit = {"x_train": x / 255, "x_test": u / 255}
    signed = {"x_train": x / np.float32(127.5) - 1, "x_test": u / np.float32(127.5) - 1}
    labels = {"y_train": y, "y_test": v}
    from_one = {"y_train": y[:, None] + 1, "y_test": v[:, None] + 1}
    forms = [first | labels, last | from_one, unit | labels, signed | labels]
    for arrays in [{"x_train": x, "x_test": u} | labels, *forms]:
        dataset = load_npz(tmp_path / "set.npz", **arrays)
        assert dataset.image_shape == (12, 9, 3) and dataset.name == "set"
        assert np.array_equal(dataset.train.images, x) and np.array_equal(dataset.test.images, u)
        assert np.array_equal(dataset.train.labels, y)
    flat = load_npz(
        tmp_path / "flat.npz", x_train=x.reshape(-1, 18 * 18), x_test=u.reshape(-1, 324), **labels
    )
    assert flat.image_shape == (18, 18, 1)
    same = fl.build_dataset(x, y, u, v, "mine")
    assert same.name == "mine" and same.digest == dataset.digest != flat.digest


def test_images_that_are_no_images_are_refused_in_one_line(tmp_path):
    x, y = colours(0)
    labels = {"y_train": y, "y_test": y}
    other = colours(0, shape=(12, 8, 3))[0]
    for train, test, message in [
        (x, other, "x_train has images of 12x9x3, but x_test of 12x8x3"),
        (x, x[..., :2], "x_test has shape (40, 12, 9, 2); it must be (n, height, width)"),
        (x, x.reshape(40, -1)[:, :323], "x_test has shape (40, 323)"),
        (x, x.astype(int) - 1, "x_test is int64 in -1..254"),
        (x / 100 - 1, x / 100, "x_train is float64 in -1..1.55"),
        (x / 127.5 - 1, x, "x_train in -1..1 but x_test in 0..255; both must have one scale"),
    ]:
        with pytest.raises(UserError) as refused:
            load_npz(tmp_path / "set.npz", x_train=train, x_test=test, **labels)
        assert message in str(refused.value)


def test_thousands_of_labels_are_kept(tmp_path):
    x = np.zeros((70_000, 2, 2), np.uint8)
    y = np.arange(70_000) % 2**16
    dataset = load_npz(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    assert dataset.num_classes == 2**16 and dataset.train.labels.dtype == np.uint16
    assert np.array_equal(dataset.train.labels, y)
    with pytest.raises(UserError, match="65537 labels are too many; use data of at most 65536"):
        load_npz(
            tmp_path / "set.npz", x_train=x, y_train=np.arange(70_000) % 65_537, x_test=x, y_test=y
        )


def test_validation_images_are_evaluated_on_where_asked(tmp_path):
    """MedMNIST's names; without --validation a notice says that they are there."""
    x, y = colours(0)
    u, v = colours(1, 20)
    a, b = colours(2, 12)
    both = {"train_images": x, "train_labels": y, "test_images": u, "test_labels": v}
    arrays = both | {"val_images": a, "val_labels": b[:, None]}
    plain = load_npz(tmp_path / "set.npz", **arrays)
    assert np.array_equal(plain.test.images, u)
    assert [text for text in plain.notices if "its 12 validation images are not used" in text]
    chosen = load_npz(tmp_path / "set.npz", validation=True, **arrays)
    assert np.array_equal(chosen.test.images, a) and np.array_equal(chosen.test.labels, b)
    assert chosen.name == "set, evaluated on its validation images"
    with pytest.raises(UserError, match="has no validation images"):
        load_npz(tmp_path / "set.npz", validation=True, **both)
    keras = {"x_train": x, "y_train": y, "x_val": a, "y_val": b, "client_train": y}
    np.savez(tmp_path / "keras.npz", **keras)
    flags = {"data": str(tmp_path / "keras.npz"), "test_share": 0.25, "validation": True}
    untested = fl.load_dataset(configure(**flags).data)
    assert np.array_equal(untested.test.images, a) and untested.owners is not None
    with pytest.raises(UserError, match="mnist has no validation images"):
        fl.load_dataset(configure(validation=True).data)
    with pytest.raises(UserError, match="both replace the test set"):
        fl.load_dataset(configure(validation=True, holdout=5, data="set.npz").data)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folders_are_read(tmp_path, digits, packed):
    for part, split in (("train", digits.train), ("t10k", digits.test)):
        for kind, array in (("images-idx3", split.images[..., 0]), ("labels-idx1", split.labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            name = tmp_path / f"{part}-{kind}-ubyte"
            content = head + array.tobytes()
            if packed:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(content))
            else:
                name.write_bytes(content)
    assert fl.load_dataset(configure(data=str(tmp_path)).data).digest == digits.digest
    turned = fl.load_dataset(configure(data=str(tmp_path), transpose=True).data)
    assert np.array_equal(turned.train.images, digits.train.images.transpose(0, 2, 1, 3))
    labels = next(tmp_path.glob("t10k-labels*"))
    for content in (b"no IDX", b"\0\0\x08", b"\0\0\x08\x01\0\0"):
        labels.write_bytes(content)
        with pytest.raises(UserError, match="t10k-labels"):
            fl.load_dataset(configure(data=str(tmp_path)).data)


def write_idx(folder, digits, names):
    """The digits as IDX files of these names, in the order of KEYS."""
    arrays = [array.squeeze() for array in (*digits.train, *digits.test)]
    for name, array in zip(names, arrays, strict=True):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        content = head + array.tobytes()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def names_of_a_set(pattern):
    """pattern of {part}, {kind} -> the four names."""
    kinds = ("images-idx3", "labels-idx1")
    return [pattern.format(part=p, kind=kind) for p in ("train", "t10k") for kind in kinds]


def test_idx_files_are_found_by_the_names_that_people_have(tmp_path, digits):
    """torchvision's, plain and gzipped side by side; Kaggle's, each in a folder of its name; and
    EMNIST's sets, several in one folder."""
    torchvision = names_of_a_set("torchvision/MNIST/raw/{part}-{kind}-ubyte")
    write_idx(tmp_path, digits, torchvision)
    write_idx(tmp_path, digits, [f"{name}.gz" for name in torchvision])
    write_idx(tmp_path, digits, names_of_a_set("kaggle/{part}-{kind}-ubyte/{part}-{kind}-ubyte"))
    write_idx(
        tmp_path,
        digits,
        [n.replace("-idx", ".idx") for n in names_of_a_set("dots/{part}-{kind}-ubyte")],
    )
    for name in ("digits", "letters"):
        write_idx(
            tmp_path, digits, names_of_a_set(f"emnist/emnist-{name}-{{part}}-{{kind}}-ubyte.gz")
        )
        # what macOS puts beside each file
        write_idx(
            tmp_path, digits, names_of_a_set(f"emnist/._emnist-{name}-{{part}}-{{kind}}-ubyte")
        )
    for name in names_of_a_set("dots/._{part}-{kind}-ubyte"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    one_of_four = "emnist/emnist-letters-train-labels-idx1-ubyte.gz"
    for place in ("torchvision", "kaggle", "dots", "emnist/emnist-letters", one_of_four):
        data = configure(data=str(tmp_path / place)).data
        assert fl.load_dataset(data).digest == digits.digest, place
    with pytest.raises(
        UserError, match="contains 2 sets of IDX files, emnist-digits, emnist-letters; c"
    ):
        fl.load_dataset(configure(data=str(tmp_path / "emnist")).data)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="contains no data; give a folder with the four"):
        fl.load_dataset(configure(data=str(empty)).data)


def test_no_more_of_a_gzipped_file_is_read_than_its_header_says(tmp_path):
    """A gigabyte behind a header of four bytes: refused in a moment; and a header that promises too
    much."""
    bomb = tmp_path / "train-labels-idx1-ubyte.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(bytes([0, 0, 8, 1, 0, 0, 0, 4]))
        for _ in range(1000):
            file.write(bytes(1_000_000))
    began = time.monotonic()
    with pytest.raises(UserError, match="is not a complete IDX file"):
        idx.read_file(bomb)
    assert time.monotonic() - began < 1
    for ranks, sizes in ((33, b"\0\0\0\1"), (40, b"\xff" * 4)):
        bomb.write_bytes(gzip.compress(bytes([0, 0, 8, ranks]) + sizes * ranks + b"\0"))
        with pytest.raises(UserError, match="is not a complete IDX file"):
            idx.read_file(bomb)
    bomb.write_bytes(gzip.compress(bytes([0, 0, 8, 2]) + b"\xff" * 8))
    with pytest.raises(UserError, match="claims to contain 18,446,744,065 GB; the limit is 8"):
        idx.read_file(bomb)


def test_images_in_fractions_bools_and_two_scales(tmp_path, digits):
    def load(name, x_train, x_test):
        arrays = {"x_train": x_train, "y_train": digits.train.labels}
        arrays |= {"x_test": x_test, "y_test": digits.test.labels}
        np.savez(tmp_path / name, **arrays)
        return fl.load_dataset(configure(data=str(tmp_path / f"{name}.npz")).data)

    x = digits.train.images
    u = digits.test.images
    resized = load("resized", x * 0.9, u * 0.9)
    assert resized.train.images.max() == np.round(255 * 0.9)
    assert "x_train was rounded to 256 grey levels" in resized.notices[0]
    unit = load("unit", x / 255 * 0.999, u / 255 * 0.999)
    assert (unit.train.images == np.round(x * 0.999)).all() and len(unit.notices) == 3
    strokes = load("bool", x > 127, u > 127)
    assert set(np.unique(strokes.train.images)) == {0, 255}
    with pytest.raises(
        UserError, match="x_train in 0..1 but x_test in 0..255; both must have one sc"
    ):
        load("mixed", x / 255, u)


def test_test_images_that_are_training_images_are_counted(tmp_path, digits):
    x, y = digits.train
    shared = np.concatenate([digits.test.images, x[:7]])
    assert canonical.count_shared(x, digits.test.images) == 0
    np.savez(
        tmp_path / "leak.npz",
        x_train=x,
        y_train=y,
        x_test=shared,
        y_test=np.concatenate([digits.test.labels, y[:7]]),
    )
    (notice,) = fl.load_dataset(configure(data=str(tmp_path / "leak.npz")).data).notices
    assert f"7 of the {len(shared)} test images are also training images" in notice


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
    with pytest.raises(UserError, match="num_clients=5 exceeds the 4 owners; choose 1 to 4"):
        fl.make_partition(dataset, configure(**flags, num_clients=5))
    with pytest.raises(UserError, match="needs data that name the owner of each image"):
        fl.make_partition(digits, configure(dataset="digits", partition="natural", num_clients=4))
    with pytest.raises(UserError, match="num_clients=0 means all owners, which are not counted"):
        fl.make_partition(dataset, configure(**flags))


def test_a_name_that_no_file_can_have_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read .File name too long."):
        fl.load_dataset(configure(data=str(tmp_path / ("x" * 300))).data)


def test_labels_far_apart_take_no_memory(tmp_path, digits):
    far = {"y_train": digits.train.labels.astype(np.int64) % 2 * 2_000_000_000}
    far |= {"y_test": digits.test.labels.astype(np.int64) % 2 * 2_000_000_000}
    np.savez(tmp_path / "far.npz", x_train=digits.train.images, x_test=digits.test.images, **far)
    dataset = fl.load_dataset(configure(data=str(tmp_path / "far.npz")).data)
    assert dataset.classes == (0, 2_000_000_000) and "0..2000000000" in dataset.notices[0]


def test_a_file_whose_name_is_no_utf_8_is_called_by_what_can_be_shown(tmp_path, digits):
    path = tmp_path / os.fsdecode(b"d\xff.npz")
    arrays = {"x_train": digits.train.images, "y_train": digits.train.labels}
    with path.open("wb") as file:
        np.savez(file, **arrays, x_test=digits.test.images, y_test=digits.test.labels)
    assert fl.load_dataset(configure(data=str(path)).data).name == "d?"
