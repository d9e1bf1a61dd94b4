"""Shard files: a client's images and labels, read only by the worker that trains it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.storage.files import expand_path, io_errors_as_user_errors, read_bytes, write_file
from harness.storage.provenance import file_hash

import numpy as np
import tensorflow as tf

LABEL_BYTES = 2
MOST_BYTES = 2**31 - 1  # of a shard; TensorFlow counts a tensor's elements by int32
FOOTER_BYTES = 8  # FarmHash64 of what comes before, by which the worker knows a damaged file


class Shard(NamedTuple):
    """A client's data: images uint8[n_k,H,W,channels] and labels int32[n_k]."""

    images: Any
    labels: Any


def folder_of(cache: str, digest: str) -> Path:
    """Return the folder of the shards of the split with this hash."""
    return expand_path(cache).absolute() / f"shards-{digest}"


def make_folder(folder: Path) -> Path:
    """Return the folder, made if it is not there."""
    with io_errors_as_user_errors(folder, "--cache"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # a client's images are for nobody else
    return folder


def write_shard(folder: Path, client: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Write `<client>.bin`: all images, all labels, and the footer, unless it is there and whole.

    `images` are uint8[n_k,H,W,channels]; `labels` [n_k] are written as little-endian uint16.
    """
    num_bytes = images.nbytes + LABEL_BYTES * len(labels) + FOOTER_BYTES
    if num_bytes > MOST_BYTES:
        raise UserError(
            f"client {client} has {num_bytes / 2**30:.1f} GiB of images, and a shard holds 2; "
            "divide them over more clients, or give smaller ones"
        )
    stored = np.frombuffer(images.tobytes() + labels.astype("<u2").tobytes(), np.uint8)
    content = stored.tobytes() + fingerprint(stored).numpy().tobytes()
    path = folder / f"{client}.bin"
    with io_errors_as_user_errors(path, "--cache"):
        if not path.exists() or read_bytes(path) != content:
            write_file(path, content, flag="--cache")


def fingerprint(data: Any) -> Any:
    """Return FarmHash64 of uint8[n] as uint8[8]: the same function here and in the worker's graph.

    It is against accidents, not against attackers.
    """
    return tf.fingerprint(data[tf.newaxis])[0]


def read_shard(folder: Path, client: Any, image_shape: Sequence[int]) -> Shard:
    """Return what a client's file holds, in the worker's graph; `image_shape` is (H, W, channels).

    `client` is an int64 scalar. Fails if the file is missing or damaged.
    """
    path = tf.strings.join([os.fsencode(folder), "/", tf.strings.as_string(client), ".bin"])
    content = tf.io.decode_raw(tf.io.read_file(path), tf.uint8)
    stored = content[:-FOOTER_BYTES]
    last = tf.pad(content[-FOOTER_BYTES:], [[FOOTER_BYTES, 0]])  # a damaged file may be shorter
    footer = last[-FOOTER_BYTES:]
    is_whole = tf.reduce_all(tf.equal(fingerprint(stored), footer))
    checked = tf.debugging.Assert(
        is_whole, ["damaged shard file (it is rewritten when the run is resumed):", path]
    )
    with tf.control_dependencies([checked]):
        size = tf.size(stored) // (math.prod(image_shape) + LABEL_BYTES)
    pixels = stored[: -LABEL_BYTES * size]
    labels = tf.bitcast(tf.reshape(stored[-LABEL_BYTES * size :], [-1, LABEL_BYTES]), tf.uint16)
    return Shard(tf.reshape(pixels, [-1, *image_shape]), tf.cast(labels, tf.int32))


def hash_shards(dataset: Any, indices: Sequence[np.ndarray], config: Any) -> str:
    """Return 16 hexadecimal digits that stand for all that the shard files of a split hold."""
    digest = hashlib.sha256(dataset.digest.encode())
    for part in indices:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    if config.chosen("partition").change_images:
        changed_by = [
            config.partition_name,
            config.fields_of_choice("partition"),
            config.seed,
            file_hash("variants/partitions.py"),
        ]
        digest.update(json.dumps(changed_by, sort_keys=True).encode())
    return digest.hexdigest()[:16]
