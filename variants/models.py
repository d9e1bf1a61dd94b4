"""Networks other than the default one, and the blocks that all are made of.

A row is a function that returns new Keras layers, those before the logits. They get images
float32[n,H,W,channels] in 0..1; the numbers of parameters are those for MNIST.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from harness.fields import UserError
from harness.files import briefly, expand_path

import tensorflow as tf


def conv(filters: int, size: int = 5, padding: str = "same") -> list[Any]:
    """Return a convolution with ReLU and a 2x2 max-pooling.

    `size` is that of its square kernel. "same" padding keeps the images' size, "valid" loses the
    border.
    """
    convolution = tf.keras.layers.Conv2D(filters, size, padding=padding, activation="relu")
    return [convolution, tf.keras.layers.MaxPool2D()]


def dense(*units: int, activation: str = "relu") -> list[Any]:
    """Return fully connected layers on the flattened input."""
    return [tf.keras.layers.Flatten(), *(tf.keras.layers.Dense(n, activation) for n in units)]


def build_logreg() -> list[Any]:
    """Softmax regression on the pixels, 7,850 parameters."""
    return dense()


def build_mlp() -> list[Any]:
    """One hidden layer."""
    return dense(128)


def build_2nn() -> list[Any]:
    """McMahan et al. 2017, section 3: the 2NN, 199,210 parameters."""
    return dense(200, 200)


def build_cnn() -> list[Any]:
    """McMahan et al. 2017, section 3: the CNN, 1,663,370 parameters."""
    return [*conv(32), *conv(64), *dense(512)]


def build_small_cnn() -> list[Any]:
    """The CNN with a half of its filters and a quarter of its units, 215,370 parameters."""
    return [*conv(16), *conv(32), *dense(128)]


def build_lenet() -> list[Any]:
    """Li et al. 2022, section V: LeNet-5 with max-pooling and ReLU, 44,426 parameters."""
    return [*conv(6, padding="valid"), *conv(16, padding="valid"), *dense(120, 84)]


ROWS: dict[str, Callable[[], list[Any]]] = {
    "logreg": build_logreg,
    "mlp": build_mlp,
    "2nn": build_2nn,
    "cnn": build_cnn,
    "small-cnn": build_small_cnn,
    "lenet": build_lenet,
}


def find(name: str, rows: dict[str, Callable[[], list[Any]]]) -> Callable[[], list[Any]]:
    """Return the row of this name, or the function that FILE.py:FUNCTION names."""
    return rows[name] if name in rows else load_own(name)


def load_own(name: str) -> Callable[[], list[Any]]:
    """Return the function that FILE.py:FUNCTION names. Raises UserError if there is none.

    The file is run as it would be by an import; its text is part of what the run is.
    """
    file, _, function_name = name.rpartition(":")
    source = f"model={name!r:.200}"
    path = expand_path(file)
    try:
        text = path.read_bytes()
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        exec(compile(text, str(path), "exec"), vars(module))
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); name a file") from error
    except Exception as error:
        raise UserError(f"{source}: its file fails ({briefly(error)}); mend it") from error
    function = vars(module).get(function_name)
    if not callable(function):
        raise UserError(f"{source}: the file has no function {function_name}; name one that it has")
    return partial(call_own, function, source, hashlib.sha256(text).hexdigest())


def call_own(function: Callable, source: str, digest: str) -> list[Any]:
    """Return the layers that a user's function makes. Raises UserError if it makes others.

    `digest` is that of its file.
    """
    try:
        made = function()
    except Exception as error:
        raise UserError(f"{source} fails ({briefly(error)}); mend it") from error
    layers = list(made.layers) if isinstance(made, tf.keras.Sequential) else made
    is_layers = isinstance(layers, list | tuple) and all(
        isinstance(layer, tf.keras.layers.Layer) for layer in layers
    )
    if not is_layers or not layers:
        raise UserError(
            f"{source} returns {type(made).__name__}; return a list of Keras layers, those before "
            "the logits"
        )
    return list(layers)


def has_max_pooling(layers: Sequence[Any]) -> bool:
    """Return whether one of the layers is a max-pooling."""
    return any(isinstance(layer, tf.keras.layers.MaxPool2D) for layer in layers)
