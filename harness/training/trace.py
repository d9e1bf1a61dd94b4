"""Traces from inside TFF's worker: a series of numbers of a client's local steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf


def append_line(path: str | Path, condition: Any, *values: Any) -> None:
    """Append the values to a CSV file as a line, if `condition` holds, from inside a graph.

    `condition` is a bool scalar, such as tf.equal(task.client, 3): in these graphs `==` compares
    Python objects. `values` are scalars. The worker writes the file, so it lies on its machine.
    """

    def write():
        tf.print(*values, sep=",", output_stream=f"file://{Path(path).absolute()}")
        return tf.constant(0)

    tf.cond(condition, write, lambda: tf.constant(0))
