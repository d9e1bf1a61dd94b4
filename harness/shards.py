"""Shard files: a client's images and labels, which only the worker that trains it reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness.files import expand_path, io_errors_as_user_errors, read_bytes, write_file

import numpy as np
import tensorflow as tf

RECORD_BYTES = 28 * 28 + 1  # an image and its label
FOOTER_BYTES = 8  # FarmHash64 of the records, by which the worker knows a damaged file


def make_folder(cache: str, digest: str) -> Path:
    """Return the folder of the shards of the split with this hash, made if it is not there."""
    folder = expand_path(cache).absolute() / f"shards-{digest}"
    with io_errors_as_user_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # a client's images are for nobody else
    return folder


def write_shard(folder: Path, client: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Write `<client>.bin`, uint8[n_k,785] and the footer, unless it is there and whole.

    `images` are uint8[n_k,28,28], `labels` uint8[n_k].
    """
    pixels = images.reshape(len(images), -1)
    records = np.concatenate([pixels, labels[:, None]], axis=1).ravel()
    content = records.tobytes() + fingerprint(records).numpy().tobytes()
    path = folder / f"{client}.bin"
    with io_errors_as_user_errors(path):
        if not path.exists() or read_bytes(path) != content:
            write_file(path, content)


def fingerprint(data: Any) -> Any:
    """Return FarmHash64 of uint8[n] as uint8[8]: the same function here and in the worker's graph.

    It is against accidents, not against attackers.
    """
    return tf.fingerprint(data[tf.newaxis])[0]


def read_shard(folder: Path, client: Any) -> Any:
    """Return uint8[n_k,785] of a client's file, in the worker's graph.

    `client` is an int64 scalar. Fails if the file is missing or damaged.
    """
    path = tf.strings.join([os.fsencode(folder), "/", tf.strings.as_string(client), ".bin"])
    content = tf.io.decode_raw(tf.io.read_file(path), tf.uint8)
    records = content[:-FOOTER_BYTES]
    footer = tf.pad(content, [[FOOTER_BYTES, 0]])[-FOOTER_BYTES:]  # also of a file that is shorter
    is_whole = tf.reduce_all(tf.equal(fingerprint(records), footer))
    checked = tf.debugging.Assert(
        is_whole, ["damaged shard file (deleted, it is made again):", path]
    )
    with tf.control_dependencies([checked]):
        return tf.reshape(records, [-1, RECORD_BYTES])
