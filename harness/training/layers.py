"""Keras layers in a federated round: seeded initial weights, keyed randomness, no state.

A round is a pure function of (seed, round, client), and only trainable weights travel. Keras' own
layers promise neither, so layers with randomness get a key, and layers with state are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import math
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.storage.files import briefly, expand_path, read_bytes, reason_of

import h5py
import numpy as np
import tensorflow as tf

MOST_PARAMETERS = 2**29 - 1  # float32, below the 2 GiB of a protocol buffer, in which they travel
WEIGHTS_MEMBER = "model.weights.h5"  # of a .keras file, which is a zip archive


def conv(filters: int, size: int = 5, padding: str = "same") -> list[Any]:
    """Return a convolution, a 2x2 max-pooling and ReLU.

    `size` is that of its square kernel. "same" padding keeps the images' size, "valid" loses the
    border. In papers ReLU comes before the pooling: the same values and gradients, bit for bit, but
    of four times the numbers.
    """
    convolution = tf.keras.layers.Conv2D(filters, size, padding=padding)
    return [convolution, tf.keras.layers.MaxPool2D(), tf.keras.layers.ReLU()]


def dense(*units: int, activation: str = "relu") -> list[Any]:
    """Return fully connected layers on the flattened input."""
    return [tf.keras.layers.Flatten(), *(tf.keras.layers.Dense(n, activation) for n in units)]


def has_max_pooling(layers: Sequence[Any]) -> bool:
    """Return whether one of the layers is a max-pooling."""
    parts = [part for layer in layers for part in parts_of(layer)]
    return any(isinstance(part, tf.keras.layers.MaxPool2D) for part in parts)


@contextlib.contextmanager
def record_initializers(name: str, image_shape: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Raise UserError where layers made in it cannot take these images, or have too many weights.

    They are counted before there is memory for them. Yields a dict: the id of a variable that is
    made -> the initializer that it was made with, if it is one of Keras'.
    """
    size = "x".join(map(str, image_shape))
    total = 0
    initializers: dict[int, Any] = {}

    def count(next_creator: Any, **options: Any) -> Any:
        nonlocal total
        total += math.prod(options["shape"] or ())  # a generator of random numbers has none
        if total > MOST_PARAMETERS:
            raise UserError(
                f"model={name!r} has more than {MOST_PARAMETERS:,} parameters for images of "
                f"{size}, too many for one TFF message; choose a smaller model or smaller images"
            )
        variable = next_creator(**options)
        # Keras gives a function of the shape and the initializer.
        initializers[id(variable)] = getattr(options.get("initial_value"), "func", None)
        return variable

    try:
        with tf.variable_creator_scope(count):
            yield initializers
    except ValueError as error:
        raise UserError(
            f"model={name!r} cannot process images of {size} ({reason_of(error)}); choose another "
            "model, such as mlp"
        ) from error


def check_layers(name: str, model: Any, takes_statistics: bool = False) -> None:
    """Raise UserError for a layer of which federated averaging, or our step, would lose something.

    Only trainable float32 weights travel, and with `takes_statistics` those of BatchNormalization.
    """
    for layer in model.layers:
        lost = what_is_lost(layer, takes_statistics)
        if lost:
            raise UserError(f"model={name!r}: the layer {layer.name} {lost}")


def what_is_lost(layer: Any, takes_statistics: bool) -> str:
    """Return which property of a layer would be lost, with a remedy; "" for most layers."""
    statistics = [
        weight
        for part in parts_of(layer)
        if isinstance(part, tf.keras.layers.BatchNormalization) and part.trainable
        for weight in part.non_trainable_weights
    ]
    known = {id(weight) for weight in statistics}
    others = [weight for weight in layer.non_trainable_weights if id(weight) not in known]
    if any(not part.trainable and part.weights for part in parts_of(layer)):
        return (
            "is frozen (trainable=False), but all layers are trained; leave it trainable, or use "
            "another layer"
        )
    lost = others if takes_statistics else layer.non_trainable_weights
    if lost:
        state = ", ".join(short_name(weight) for weight in lost)
        cure = "or a layer without state" if others else "or add --batch-norm average"
        return (
            f"keeps state ({state}), which averaging the clients' weights would lose; use "
            f"LayerNormalization or GroupNormalization, {cure}"
        )
    if any(weight.dtype != tf.float32 for weight in layer.weights):
        return (
            "has weights that are not float32, the only dtype supported; leave its dtype at "
            "the default"
        )
    for part in parts_of(layer):
        for name, value in vars(part).items():
            option = name.replace("_activity", "activity")
            if value is None or option.startswith("_"):
                continue
            if option.endswith("_constraint"):
                return f"has a {option}, which local steps would not apply; remove it"
    return ""


def short_name(weight: Any) -> str:
    """Return "gamma" of the variable "layer_normalization/gamma:0"."""
    return weight.name.rpartition("/")[2].partition(":")[0]


def initial_weights(model: Any, initializers: dict[int, Any], seed: int) -> list[np.ndarray]:
    """Return the weights as the layers' own initializers draw them, by seed and position.

    `initializers` are those of `record_initializers`.
    """
    weights = []
    for position, weight in enumerate(model.weights):
        initializer = initializers.get(id(weight))
        options = initializer.get_config() if hasattr(initializer, "get_config") else {}
        if "seed" not in options:
            check_repeats(weight, initializer)
        if "seed" in options:
            initializer = type(initializer).from_config(
                {**options, "seed": seed + 2**31 * position}
            )
            weights.append(initializer(weight.shape).numpy())
        else:
            # zeros, ones, or what else the layer has without any chance
            weights.append(weight.numpy())
    return weights


def check_repeats(weight: Any, initializer: Any) -> None:
    """Raise UserError for a custom initializer that draws different values on each call."""
    again = initializer(weight.shape, dtype=weight.dtype) if callable(initializer) else np.nan
    if not np.array_equal(weight.numpy(), again):
        raise UserError(
            f"the weight {weight.name} has no Keras initializer that can be seeded; give its "
            'layer one, such as "glorot_uniform"'
        )


def read_weights(file: str, model: Any) -> list[np.ndarray]:
    """Return the weights that a .keras file has for the layers of `model`, float32 arrays.

    Only arrays are read: a configuration in such a file can name any Python function, and Keras
    2.14 calls it (CVE-2025-1550). Raises UserError if the file has other layers or shapes.
    """
    source = f"{str(expand_path(file))!r:.200}"
    wanted = [weight.shape for weight in model.get_weights()]
    try:
        with tempfile.TemporaryDirectory() as made:
            copy = Path(made) / "model.weights.h5"  # Keras reads no name that is not UTF-8
            copy_arrays(expand_path(file), copy, source, wanted)
            model.load_weights(copy)
    except UserError:
        raise
    except Exception as error:  # zipfile, h5py and Keras raise a dozen kinds on what is no model
        raise UserError(
            f"{source} cannot be read as a Keras model ({briefly(error)}); give a complete .keras "
            "file of the same --model"
        ) from error
    return model.get_weights()


def copy_arrays(path: Path, copy: Path, source: str, wanted: Sequence[tuple[int, ...]]) -> None:
    """Write the weights in a .keras file, and nothing else of it, into an HDF5 file of their own.

    `wanted` are the weights' shapes. They are compared before an array is read, as a small file can
    say that it has huge ones. Links, which can lead to other files, are not followed.
    """
    most = 1_000_000 + 32 * sum(map(math.prod, wanted))  # with the state of an optimizer
    with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as archive:
        content = archive.open(WEIGHTS_MEMBER).read(most + 1)
    if len(content) > most:
        raise ValueError("it has too many weights for this network")
    nodes: dict[str, Any] = {}
    with h5py.File(io.BytesIO(content), "r") as stored, h5py.File(copy, "w") as copied:
        stored.visititems(nodes.__setitem__)
        weights = {
            name: node
            for name, node in nodes.items()
            if isinstance(node, h5py.Dataset) and not name.startswith("optimizer/")
        }
        found = [node.shape for node in weights.values()]
        # Here they are in the order of the layers' names.
        if sorted(found) != sorted(wanted):
            raise UserError(
                f"{source} has weights of shapes {found!s:.100}, but this network with these "
                f"images and labels needs {wanted!s:.100}; give a file of the same --model and "
                "data"
            )
        copied.require_group("vars")  # the model's own, of which there are none
        for name, node in weights.items():
            if node.external or node.is_virtual or node.dtype.kind not in "fiu":
                raise ValueError(f"{name} holds no numbers of its own")
            copied[name] = node[...].astype(np.float32)


def hash_weights(file: str) -> str:
    """Return the SHA-256 of a file. Raises UserError if it cannot be read."""
    path = expand_path(file)
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise UserError(
            f"initial_model={str(path)!r:.200} cannot be read ({error.strerror}); give an "
            "existing file"
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
            "the model has a layer whose randomness cannot be seeded per round and client; use "
            "another layer"
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


def take_tensor(weight: Any, options: dict[str, Any]) -> Any:
    """Return a layer's `weight`, for a variable that it makes with these options.

    Raises UserError where the shapes differ, as a function may return other layers in each call.
    """
    wanted = tuple(options["shape"] or ())
    if tuple(weight.shape) != wanted:
        raise UserError(
            f"the model's function returns different layers on each call (a weight of {wanted}, "
            f"previously {tuple(weight.shape)}); it must return the same architecture every time"
        )
    return weight


def catch_statistics(weights: Sequence[Any], statistics: Sequence[int]) -> Sequence[Any]:
    """Return the tensors of a step, of which a BatchNormalization can move its `statistics`.

    Keras assigns new values to variables; these tensors note them in their attribute `moved`.
    """
    if not statistics:
        return weights
    tensors = list(weights)
    for place in statistics:
        tensor = tf.identity(weights[place])
        tensor.moved = tensor

        def assign(value: Any, name: Any = None, tensor: Any = tensor) -> Any:
            tensor.moved = tf.convert_to_tensor(value)
            return tensor.moved

        def assign_sub(delta: Any, name: Any = None, tensor: Any = tensor) -> Any:
            tensor.moved = tensor - delta
            return tensor.moved

        tensor.assign = assign
        tensor.assign_sub = assign_sub
        tensors[place] = tensor
    return tensors


def add_moves(gradients: Any, caught: Sequence[Any], statistics: Sequence[int]) -> Any:
    """Return the gradients; in the places of statistics, how far the step moved them: w - moved."""
    if not statistics:
        return gradients
    found = list(gradients)
    for place in statistics:
        found[place] = caught[place] - caught[place].moved
    return type(gradients)(found)


def assign_weights(model: Any, weights: Any) -> None:
    """Assign TFF's ModelWeights to a Keras model, whose statistics are among the trained ones."""
    for variable, value in zip(model.weights, weights.trainable, strict=True):
        variable.assign(value)


def scratch_graph() -> Any:
    """Return a context in which layers are made: a functional model leaves its inputs in it.

    They are placeholders, which a function of our own graph would ask a value for.
    """
    return tf.__internal__.FuncGraph("layers").as_default()


def check_new(name: str, layers: Sequence[Any]) -> None:
    """Raise UserError for layers that were used before: their own weights would be trained.

    A functional model is built when it is made; inspect_own tells whether it is a new one.
    """
    if any(layer.built and not isinstance(layer, tf.keras.Model) for layer in layers):
        raise UserError(
            f"model={name!r}: its function returns layers that are already built; create new "
            "layers on each call"
        )


def parts_of(layer: Any) -> list[Any]:
    """Return the layer and all layers in it."""
    return list(layer._flatten_layers())


def random_parts(layer: Any) -> list[Any]:
    """Return those of the layer, and of the layers in it, that draw random numbers."""
    return [part for part in parts_of(layer) if hasattr(part, "_random_generator")]


def are_random(layers: Sequence[Any]) -> bool:
    """Return whether any of the layers draws random numbers while it trains."""
    return any(random_parts(layer) for layer in layers)


def penalties(layers: Sequence[Any]) -> list[Any]:
    """Return the losses that layers add in a step, such as those of their regularizers."""
    return [loss for layer in layers for loss in layer.losses]


def train_layer(layer: Any, x: Any, key: Any, position: int) -> Any:
    """Return layer(x) in training. Its randomness follows from `key` int64[2] and its position."""
    for number, part in enumerate(random_parts(layer)):
        own = tf.random.experimental.stateless_fold_in(key, 1000 * position + number)
        part._random_generator = KeyedRandomness(own)
    if "training" in inspect.signature(layer.call).parameters:
        return layer(x, training=True)
    return layer(x)
