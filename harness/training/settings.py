"""Settings of TensorFlow and Keras during a run in this process.

A setting of Keras in ~/.keras/keras.json, or of TensorFlow in an earlier cell of a notebook, would
change a run's weights in silence, or end in a traceback that names something else. Afterwards
everything is as it was.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from harness.cli.fields import UserError

import tensorflow as tf

# A private module: TensorFlow's public ones can switch determinism on, but not off again.
from tensorflow.python.framework import config as tf_config

computing_process = 0  # the id of the process in which TensorFlow has run


class Setting(NamedTuple):
    """A setting: how it is read and set, and what it is in a run."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    value: Any


def writes_no_bytecode() -> bool:
    """Return whether an import leaves no bytecode behind."""
    return sys.dont_write_bytecode


def write_no_bytecode(wanted: bool) -> None:
    """Choose whether imports leave bytecode, which that of AutoGraph's files would do in TMPDIR."""
    sys.dont_write_bytecode = wanted


def set_determinism(wanted: bool) -> None:
    """Choose the kernels of TF_DETERMINISTIC_OPS, or the usual ones, which repeat here too."""
    if wanted:
        tf_config.enable_op_determinism()
    else:
        tf_config.disable_op_determinism()


keras = tf.keras
SETTINGS = [
    Setting(keras.backend.floatx, keras.backend.set_floatx, "float32"),
    Setting(keras.backend.image_data_format, keras.backend.set_image_data_format, "channels_last"),
    Setting(
        keras.mixed_precision.global_policy, keras.mixed_precision.set_global_policy, "float32"
    ),
    Setting(tf.config.functions_run_eagerly, tf.config.run_functions_eagerly, False),
    Setting(tf_config.is_op_determinism_enabled, set_determinism, False),
    Setting(writes_no_bytecode, write_no_bytecode, True),
]


@contextlib.contextmanager
def pinned_keras_settings() -> Iterator[None]:
    """Compute with these settings inside; a context, or a decorator.

    Raises UserError in a process that was forked from one in which TensorFlow has run: its threads
    are not there, and it would wait for them without end.
    """
    global computing_process
    computing_process = computing_process or os.getpid()
    if computing_process != os.getpid():
        raise UserError(
            "this process was forked from one in which TensorFlow has run, and would hang; start "
            "it with multiprocessing's method 'spawn'"
        )
    before = [setting.read() for setting in SETTINGS]
    try:
        for setting in SETTINGS:
            setting.write(setting.value)
        yield
    finally:
        for setting, value in zip(SETTINGS, before, strict=True):
            setting.write(value)
