"""Data: the committed MNIST is MNIST, and what is not well-formed is refused with what is wrong."""

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


def test_holdout_evaluates_on_training_images_alone(digits):
    held = fl.load_dataset(configure(dataset="digits", holdout=437).data)
    assert len(held.train.labels) == 1000 and len(held.test.labels) == 437 and "held out" in held.name
    together = np.concatenate([held.train.images, held.test.images])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in digits.train.images)
    with pytest.raises(UserError, match="holdout=1437 leaves none"):
        fl.load_dataset(configure(dataset="digits", holdout=1437).data)


def broken_files(folder, digits):
    """name -> (bytes of the file, what the message must say of it)."""
    good = {"x_train": digits.train.images, "y_train": digits.train.labels,
            "x_test": digits.test.images, "y_test": digits.test.labels}  # fmt: skip

    def npz(**changed):
        buffer = io.BytesIO()
        np.savez(buffer, **{key: value for key, value in {**good, **changed}.items() if value is not None})
        return buffer.getvalue()

    return {
        "truncated.npz": (npz()[:-1000], "truncated"),
        "text.npz": (b"these are no arrays", "truncated, or no .npz"),
        "empty.npz": (b"", "truncated, or no .npz"),
        "keyless.npz": (npz(y_test=None), "no array y_test"),
        "float.npz": (npz(x_train=good["x_train"] / 255), "x_train is float64"),
        "flat.npz": (npz(x_test=good["x_test"].reshape(-1, 784)), "x_test has shape (360, 784)"),
        "short.npz": (npz(y_train=good["y_train"][:-1]), "y_train has shape (1436,)"),
        "negative.npz": (npz(y_test=good["y_test"].astype(np.int16) - 1), "y_test spans -1..8"),
        "gap.npz": (npz(y_train=np.where(good["y_train"] == 3, 4, good["y_train"])), "label 3"),
        "pickle.npz": (npz(y_test=np.array([{}] * 360, dtype=object)), "cannot be read"),
    }


def test_broken_files_are_refused_with_what_is_wrong(tmp_path, digits):
    for name, (content, message) in broken_files(tmp_path, digits).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=".") as error:
            fl.load_dataset(configure(data=str(tmp_path / name)).data)
        assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
