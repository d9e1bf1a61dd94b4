"""Networks other than the default one, and custom ones.

A row is a function that returns new Keras layers, those before the logits. They get images
float32[n,H,W,channels] in 0..1; the numbers of parameters are those for MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from harness.cli import own_files
from harness.cli.fields import UserError
from harness.engine.execution import convert, usual_autograph
from harness.training.layers import conv, dense, parts_of

import tensorflow as tf


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


def load_own(name: str) -> Callable[[], list[Any]]:
    """Return the function that FILE.py:FUNCTION names, which makes layers.

    Raises UserError if there is none.
    """
    return partial(make_own_layers, own_files.load_function(name, "model"))


def make_own_layers(make: partial) -> list[Any]:
    """Return the layers that a user's function makes; a functional model is one.

    Raises UserError if it makes something else.
    """
    # Functions that are not to be converted call it, too.
    with usual_autograph():
        made = make()
    source = f"model={str(make.args[1])!r:.200}"
    layers = made
    if isinstance(made, tf.keras.Model):
        is_list = isinstance(made, tf.keras.Sequential) and not made.built
        layers = list(made.layers) if is_list else [made]
        num_ends = [len(made.inputs or [0]), len(made.outputs or [0])]
        if num_ends != [1, 1]:
            raise UserError(
                f"{source} has {num_ends[0]} inputs and {num_ends[1]} outputs; return a model with "
                "one of each"
            )
    is_layers = isinstance(layers, list | tuple) and all(
        isinstance(layer, tf.keras.layers.Layer) for layer in layers
    )
    if not is_layers or not layers:
        returned = "no layer" if is_layers else type(made).__name__
        raise UserError(
            f"{source} returns {returned}; return a Keras model, or a list of Keras layers, "
            "without the logits layer"
        )
    for layer in layers:
        convert_calls(layer)
    return list(layers)


def convert_calls(layer: Any) -> None:
    """Have AutoGraph convert what a user's own layers do, as it does where Keras trains them.

    Then they may have an `if` or a loop on a tensor.
    """
    for part in parts_of(layer):
        if part.call.__module__.partition(".")[0] != "keras":
            part.call = convert(part.call)
