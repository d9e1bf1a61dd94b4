"""What TensorFlow and Keras are told while a run computes in this process, whatever the user has
told them.

A setting of Keras in ~/.keras/keras.json, or of TensorFlow in an earlier cell of a notebook, would
change a run's weights in silence, or end in a traceback that names something else. Afterwards
everything is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# the one place that can take determinism back
from tensorflow.python.framework import (
    config as tf_config,
)


def set_determinism(wanted: bool) -> None:
    """Choose the kernels and formulas that TF_DETERMINISTIC_OPS and enable_op_determinism choose,
    or the usual ones."""
    (tf_config.enable_op_determinism if wanted else tf_config.disable_op_determinism)()


keras = tf.keras
SETTINGS: tuple[
    tuple[Callable[[], Any], Callable[[Any], None], Any], ...
] = (  # how it is asked for, set, and to what
    (keras.backend.floatx, keras.backend.set_floatx, "float32"),
    (keras.backend.image_data_format, keras.backend.set_image_data_format, "channels_last"),
    (keras.mixed_precision.global_policy, keras.mixed_precision.set_global_policy, "float32"),
    (tf.config.functions_run_eagerly, tf.config.run_functions_eagerly, False),
    (tf_config.is_op_determinism_enabled, set_determinism, False),
)


@contextlib.contextmanager
def documented_settings() -> Iterator[None]:
    """Compute as documented inside, as a context or a decorator: float32, channels last, graphs,
    the usual kernels."""
    before = [ask() for ask, _, _ in SETTINGS]
    try:
        for _, choose, value in SETTINGS:
            choose(value)
        yield
    finally:
        for (_, choose, _), value in zip(SETTINGS, before, strict=True):
            choose(value)
