"""A user's own model: what it is made of, whether it can be trained, the order of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.storage.files import reason_of
from harness.training.layers import check_new, parts_of, record_initializers

import numpy as np
import tensorflow as tf

# Layers after which a Dense layer for the logits follows, whatever they give.
NEVER_LAST = (
    tf.keras.layers.ReLU,
    tf.keras.layers.LeakyReLU,
    tf.keras.layers.PReLU,
    tf.keras.layers.ELU,
    tf.keras.layers.ThresholdedReLU,
    tf.keras.layers.Dropout,
    tf.keras.layers.AlphaDropout,
    tf.keras.layers.GaussianDropout,
    tf.keras.layers.GaussianNoise,
    tf.keras.layers.LayerNormalization,
    tf.keras.layers.UnitNormalization,
)


class OwnModel(NamedTuple):
    """What a user's layers are."""

    has_logits: bool  # whether they end in a value for each label, and so need no Dense layer
    # For each weight in the order in which they are made, its place among the model's weights; in a
    # functional model with branches these are two orders.
    creation_order: tuple[int, ...]
    statistics: tuple[int, ...]  # places of BatchNormalization's moving means and variances
    norms: tuple[int, ...]  # places of all its tensors


@contextlib.contextmanager
def errors_of_layers(name: str) -> Iterator[None]:
    """Turn what a user's layers raise into one line.

    A ValueError stays: by it Keras tells that the images do not fit.
    """
    try:
        yield
    except (UserError, ValueError):
        raise
    except Exception as error:
        raise UserError(
            f"model={name!r}: its layers raise {type(error).__name__} ({reason_of(error)}); use "
            "TensorFlow's functions in them"
        ) from error


def inspect_own(
    name: str, build_layers: Callable[[], Sequence[Any]], image_shape: Sequence[int], labels: int
) -> OwnModel:
    """Return what a user's layers are, after making them as often as a run does.

    Raises UserError for probabilities: local training takes logits. Also for layers that give no
    flat output, and for a function that returns other or the same layers in each call.
    """
    shapes = []
    for _ in range(3):
        with record_initializers(name, image_shape) as made, errors_of_layers(name):
            hidden = build_layers()
            check_kind(name, hidden)
            check_new(name, hidden)
            model = tf.keras.Sequential([tf.keras.Input(image_shape), *hidden])
            # A model of another input is found only now.
            outputs = model(tf.random.stateless_uniform([4, *image_shape], (0, 1))).numpy()
        places = {id(weight): place for place, weight in enumerate(model.weights)}
        if not places.keys() <= made.keys():
            raise UserError(
                f"model={name!r}: its function returns layers that are already built; create new "
                "layers on each call"
            )
        shapes.append([weight.shape for weight in model.weights] + [model.output_shape])
    if shapes[0] != shapes[1] or shapes[1] != shapes[2]:
        raise UserError(
            f"model={name!r}: its function returns different layers on each call; it must return "
            "the same architecture every time"
        )
    if len(model.output_shape) != 2:
        size = "x".join(map(str, model.output_shape[1:]))
        raise UserError(
            f"model={name!r} ends in {size} values per image, but one row per image is needed; "
            "add tf.keras.layers.Flatten() or GlobalAveragePooling2D()"
        )
    last = last_layer(hidden[-1])
    activation = getattr(getattr(last, "activation", None), "__name__", "linear")
    activation = "softmax" if isinstance(last, tf.keras.layers.Softmax) else activation
    is_softmax = bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=-1), 1, atol=1e-4))
    if is_softmax and activation == "linear":  # in a function or a subclassed model
        activation = "softmax"
    if "softmax" in activation or (activation == "sigmoid" and model.output_shape[1] == labels):
        raise UserError(
            f"model={name!r} ends in a {activation}, but local training expects logits; remove "
            f"the {activation}"
        )
    is_hidden = isinstance(last, NEVER_LAST) or activation != "linear"
    order = tuple(places[weight] for weight in made if weight in places)
    trained = {id(weight) for weight in model.trainable_weights}
    statistics = tuple(place for weight, place in places.items() if weight not in trained)
    norms = tuple(
        places[id(weight)]
        for layer in model.layers
        for part in parts_of(layer)
        if isinstance(part, tf.keras.layers.BatchNormalization)
        for weight in part.weights
    )
    has_logits = model.output_shape[1] == labels and not is_hidden
    return OwnModel(has_logits, order, statistics, norms)


def check_kind(name: str, hidden: Sequence[Any]) -> None:
    """Raise UserError for layers of mixed precision, and for an input layer in a list of them."""
    for layer in hidden:
        if isinstance(layer, tf.keras.layers.InputLayer):
            raise UserError(
                f"model={name!r}: its function returns an InputLayer in its list; leave it out, as "
                "the shape of the images is known"
            )
        for part in parts_of(layer):
            if getattr(part, "compute_dtype", "float32") in ("float16", "bfloat16"):
                raise UserError(
                    f"model={name!r}: the layer {part.name} computes in {part.compute_dtype}; "
                    "leave its dtype at the default, float32"
                )


def last_layer(layer: Any) -> Any:
    """Return the layer that gives the output: of a functional model, or one in it, its last one."""
    while isinstance(layer, tf.keras.Model) and layer.outputs:
        layer = layer.outputs[0]._keras_history.layer
    return layer


def places_by_layer(model: Any) -> list[list[int]]:
    """Return, for each layer of a model that has weights, their places among the model's."""
    places = {id(weight): place for place, weight in enumerate(model.weights)}
    found = []
    for layer in model.layers:
        for part in parts_of(layer):
            own = [*part._trainable_weights, *part._non_trainable_weights]
            if own:
                found.append([places[id(weight)] for weight in own])
    return sorted(found, key=max)
