"""Keras layers in a federated round: initial weights by seed, randomness by key, and no state.

A round is a pure function of (seed, round, client), and only trainable weights travel. Keras' own
layers promise neither, so layers with randomness get a key, and layers with state are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.fields import UserError
from harness.files import briefly, expand_path, read_bytes

import numpy as np
import tensorflow as tf

MOST_PARAMETERS = 2**29 - 1  # float32, below the 2 GiB of a protocol buffer, in which they travel
# The layer's attribute that draws a weight, where it isn't called `<weight>_initializer`.
DRAWN_BY = {
    name: f"{name.removesuffix('_kernel')}_initializer"
    for name in ("depthwise_kernel", "pointwise_kernel", "recurrent_kernel")
}


@contextlib.contextmanager
def refuse_wrong_size(name: str, image_shape: Sequence[int]) -> Iterator[None]:
    """Raise UserError where layers made in it cannot take these images, or have too many weights.

    They are counted before there is memory for them.
    """
    size = "x".join(map(str, image_shape))
    total = 0

    def count(next_creator: Any, **options: Any) -> Any:
        nonlocal total
        total += math.prod(options["shape"] or ())  # a generator of random numbers has none
        if total > MOST_PARAMETERS:
            raise UserError(
                f"model={name!r} has more than {MOST_PARAMETERS:,} parameters with images of "
                f"{size}, too many for a message of TFF; choose a smaller model or smaller images"
            )
        return next_creator(**options)

    try:
        with tf.variable_creator_scope(count):
            yield
    except ValueError as error:
        # Keras says first in which layer it was, then what.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next(iter(lines[1:]), lines[0]).partition(" for '{{")[0]
        raise UserError(
            f"model={name!r} cannot take images of {size} ({reason:.200}); choose another, such as "
            "mlp"
        ) from error


def check_layers(name: str, model: Any) -> None:
    """Raise UserError for a layer of which federated averaging, or our step, would lose something.

    Only trainable float32 weights travel, and only the cross-entropy is minimized.
    """
    for layer in model.layers:
        lost = what_is_lost(layer)
        if lost:
            raise UserError(f"model={name!r}: the layer {layer.name} {lost}")


def what_is_lost(layer: Any) -> str:
    """Return what of a layer would be lost, and the cure; of most layers nothing."""
    if layer.non_trainable_weights:
        state = ", ".join(short_name(weight) for weight in layer.non_trainable_weights)
        return (
            f"keeps state ({state}), which the mean of the clients' weights leaves out; use "
            "LayerNormalization or GroupNormalization, or another layer without it"
        )
    if any(weight.dtype != tf.float32 for weight in layer.weights):
        return "has weights that are not float32, in which all weights travel; leave its dtype out"
    for part in (layer, *layer.submodules):
        for name, value in vars(part).items():
            option = name.replace("_activity", "activity")
            if value is None or option.startswith("_"):
                continue
            if option.endswith("_regularizer"):
                return f"has a {option}, whose loss no client adds; use --weight-decay"
            if option.endswith("_constraint"):
                return f"has a {option}, which no local step applies; leave it out"
    return ""


def short_name(weight: Any) -> str:
    """Return "gamma" of the variable "layer_normalization/gamma:0"."""
    return weight.name.rpartition("/")[2].partition(":")[0]


def initial_weights(model: Any, seed: int) -> list[np.ndarray]:
    """Return the weights as the layers' own initializers draw them, by seed and position."""
    owners = {id(value): owner for owner in model.submodules for value in vars(owner).values()}
    weights = []
    for position, weight in enumerate(model.weights):
        name = short_name(weight)
        owner = owners.get(id(weight))
        initializer = getattr(owner, DRAWN_BY.get(name, f"{name}_initializer"), None)
        if initializer is None:
            raise UserError(
                f"the weight {weight.name} has no initializer that can be seeded; use another layer"
            )
        options = initializer.get_config()
        if "seed" in options:
            initializer = type(initializer).from_config(
                {**options, "seed": seed + 2**31 * position}
            )
            weights.append(initializer(weight.shape).numpy())
        else:
            # zeros, ones, or what else the layer has without any chance
            weights.append(weight.numpy())
    return weights


def read_weights(file: str, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the weights in a .keras file. Raises UserError if their shapes differ from `like`.

    No code of the file is run: Keras refuses what would need it.
    """
    path = expand_path(file)
    try:
        with tempfile.TemporaryDirectory() as made:
            copy = Path(made) / "model.keras"  # Keras reads no name that is not UTF-8
            copy.write_bytes(read_bytes(path))
            weights = tf.keras.models.load_model(copy, compile=False).get_weights()
    except Exception as error:  # Keras raises a dozen kinds on what is no model
        raise UserError(
            f"{str(path)!r:.200} cannot be read as a Keras model ({briefly(error)}); give a whole "
            ".keras file"
        ) from error
    found = [weight.shape for weight in weights]
    wanted = [weight.shape for weight in like]
    if found != wanted:
        raise UserError(
            f"{str(path)!r:.200} has weights of shapes {found!s:.100}, where this network with "
            f"these images and labels has {wanted!s:.100}; give a file of the same --model and data"
        )
    return [weight.astype(np.float32) for weight in weights]


def hash_weights(file: str) -> str:
    """Return the SHA-256 of a file. Raises UserError if it cannot be read."""
    path = expand_path(file)
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise UserError(
            f"initial_model={str(path)!r:.200} cannot be read ({error.strerror}); name a file"
        ) from error


class KeyedRandomness:
    """Stands in for a Keras layer's RandomGenerator: its numbers follow from a key int64[2]."""

    def __init__(self, key: Any):
        self.key = key
        self.draws = 0

    def _maybe_init(self) -> None:
        """Keras asks for this before the first draw; there is nothing to do."""

    def make_seed_for_stateless_op(self) -> Any:
        """Return a key int64[2], another for each draw of a layer's call."""
        self.draws += 1
        return tf.random.experimental.stateless_fold_in(self.key, self.draws)

    def make_legacy_seed(self) -> None:
        """Refuse a layer whose randomness no key can be given to."""
        raise UserError(
            "the model has a layer whose randomness cannot be seeded by round and client; use "
            "another"
        )

    def random_normal(
        self,
        shape: Any,
        mean: float = 0.0,
        stddev: float = 1.0,
        dtype: Any = None,
        nonce: Any = None,
    ):
        """Return normal numbers."""
        return tf.random.stateless_normal(
            shape, self.make_seed_for_stateless_op(), mean, stddev, dtype or tf.float32
        )

    def random_uniform(
        self,
        shape: Any,
        minval: Any = 0.0,
        maxval: Any = None,
        dtype: Any = None,
        nonce: Any = None,
    ):
        """Return uniform numbers."""
        most = 1.0 if maxval is None else maxval
        return tf.random.stateless_uniform(
            shape, self.make_seed_for_stateless_op(), minval, most, dtype or tf.float32
        )

    def truncated_normal(
        self,
        shape: Any,
        mean: float = 0.0,
        stddev: float = 1.0,
        dtype: Any = None,
        nonce: Any = None,
    ):
        """Return normal numbers within two standard deviations."""
        key = self.make_seed_for_stateless_op()
        return tf.random.stateless_truncated_normal(shape, key, mean, stddev, dtype or tf.float32)

    def dropout(self, inputs: Any, rate: float, noise_shape: Any = None) -> Any:
        """Return the inputs, each 0 with probability `rate`, else divided by 1 - rate."""
        return tf.nn.experimental.stateless_dropout(
            inputs, rate, self.make_seed_for_stateless_op(), noise_shape=noise_shape
        )


def check_new(name: str, layers: Sequence[Any]) -> None:
    """Raise UserError for layers that were used before: their own weights would be trained."""
    if any(layer.built for layer in layers):
        raise UserError(
            f"model={name!r}: its function returns layers that are in use; make them anew in each "
            "call"
        )


def random_parts(layer: Any) -> list[Any]:
    """Return those of the layer, and of the layers in it, that draw random numbers."""
    parts = [part for part in (layer, *layer.submodules) if isinstance(part, tf.keras.layers.Layer)]
    return [part for part in parts if hasattr(part, "_random_generator")]


def are_random(layers: Sequence[Any]) -> bool:
    """Return whether any of the layers draws random numbers while it trains."""
    return any(random_parts(layer) for layer in layers)


def train_layer(layer: Any, x: Any, key: Any, position: int) -> Any:
    """Return layer(x) in training. Its randomness follows from `key` int64[2] and its position."""
    for number, part in enumerate(random_parts(layer)):
        own = tf.random.experimental.stateless_fold_in(key, 1000 * position + number)
        part._random_generator = KeyedRandomness(own)
    if "training" in inspect.signature(layer.call).parameters:
        return layer(x, training=True)
    return layer(x)
