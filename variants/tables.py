"""Tables of images: CSV as Kaggle has MNIST, parquet as Hugging Face has it, a file per client."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.storage.files import briefly, read_bytes
from harness.training.dataset import KEYS, OWNERS, Arrays
from variants.pictures import MODES_OF_GREY, decode

import numpy as np

LABEL_NAMES = ("label", "labels", "class", "target", "y")  # of a column
PARTS = ("train", "test")


def find_tables(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Return "train" and "test" -> the files of that part, such as train-00000-of-00002.parquet."""
    try:
        names = sorted(path for path in folder.iterdir() if path.suffix.lower() == ending)
    except OSError:
        return {}
    words = {path: re.split(r"[\W_]+", path.stem.lower()) for path in names}
    found = {part: [path for path in names if part in words[path]] for part in PARTS}
    return {part: paths for part, paths in found.items() if paths}


def read_tables(files: dict[str, list[Path]], read: Callable[[Path], Arrays]) -> Arrays:
    """Return the arrays of the parts' files; read(path) returns images `x` and labels `y`."""
    raw: Arrays = {}
    for part, paths in files.items():
        source = f"data={str(paths[0].parent)!r:.200}"
        pieces = [read(path) for path in paths]
        check_alike([(piece["x"], piece["y"]) for piece in pieces], source, "files")
        for key in ("x", "y"):
            raw[f"{key}_{part}"] = join(key, pieces, source)
    return raw


def check_alike(pieces: Sequence[tuple[np.ndarray, np.ndarray]], source: str, whose: str) -> None:
    """Raise UserError for images of two scales, or labels of two kinds, in (images, labels)."""
    are_fractions = {bool(np.max(images, initial=0) <= 1) for images, _ in pieces if len(images)}
    are_texts = {labels.dtype.kind in "USO" for _, labels in pieces if len(labels)}
    if len(are_fractions) > 1 or len(are_texts) > 1:
        raise UserError(
            f"{source}: some {whose}' images are in 0..1 and others' in 0..255, or some labels are "
            "texts and others numbers; give all in one form"
        )


# == CSV ===========================================================================================


def read_csv(path: Path) -> Arrays:
    """Return images `x` uint8 or float64[n,pixels] and labels `y` [n] of a CSV file.

    A row is an image: its label, first or last, and its pixels. A first row of names is skipped.
    Raises UserError for another table.
    """
    source = f"data={str(path)!r:.200}"
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read ({briefly(error)}); give a CSV file") from error
    lines = [line for line in lines if line.strip()]
    separator = ";" if lines and lines[0].count(";") > lines[0].count(",") else ","
    names = split_row(lines[0], separator) if lines else []
    words = [name.lower() for name in names if name and not is_number(name)]
    # A text label alone is not a header, but its name is: pandas writes 0,1,...,63,label.
    has_header = len(words) > 1 or any(word in LABEL_NAMES for word in words)
    rows = lines[1:] if has_header else lines
    if len({row.count(separator) for row in rows}) > 1:
        raise UserError(f"{source} has rows of different lengths; give one label and its pixels")
    if not rows or len(names) < 3:
        raise UserError(f"{source} has no rows of a label and pixels; give one row per image")
    place = find_label_column(names, has_header, rows, separator, source)
    if any(cut_edge(row, separator, place).count('"') % 2 for row in rows):
        raise UserError(
            f"{source}: a label in quotation marks has a {separator!r} in it; rename the label"
        )
    labels = np.array([edge_of(row, separator, place) for row in rows])
    if all(map(is_number, labels)):
        labels = labels.astype(np.float64)
    others = [column for column in range(len(names)) if column != place % len(names)]
    try:
        pixels = np.loadtxt(
            rows, delimiter=separator, usecols=others, ndmin=2, quotechar='"', comments=None
        )
    except ValueError as error:
        raise UserError(
            f"{source}: a pixel is not a number, or a row has another length ({briefly(error)}); "
            "fix the file"
        ) from error
    return {"x": to_squares(pixels, source), "y": labels}


def split_row(row: str, separator: str) -> list[str]:
    """Return the values of a row of a CSV file, without quotes."""
    return [value.strip().strip("\"'") for value in row.split(separator)]


def edge_of(row: str, separator: str, place: int) -> str:
    """Return the first value of a row for place 0, the last one for -1, without quotes."""
    return cut_edge(row, separator, place).strip().strip("\"'")


def cut_edge(row: str, separator: str, place: int) -> str:
    """Return what stands before the first separator for place 0, behind the last one for -1."""
    return row.rsplit(separator, 1)[-1] if place else row.split(separator, 1)[0]


def is_number(text: str) -> bool:
    """Return whether a value of a CSV file is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def find_label_column(
    names: Sequence[str], has_header: bool, rows: Sequence[str], separator: str, source: str
) -> int:
    """Return the place of the labels: 0 or -1.

    By the header, or else by which column is text or can hold labels: few different whole numbers,
    more than one. Raises UserError if neither can.
    """
    named = [place for place in (0, -1) if has_header and names[place].lower() in LABEL_NAMES]
    if named:
        return named[0]
    if has_header and any(name.lower() in LABEL_NAMES for name in names):
        raise UserError(
            f"{source}: the column of the labels is neither the first nor the last one; write the "
            "file without an index, and with that column at an end"
        )
    if has_header and all("pixel" in names[place].lower() for place in (0, -1)):
        raise UserError(
            f"{source} has no column label, as Kaggle's test.csv; give the training file alone, "
            "with --test-share 0.2"
        )
    candidates = []
    for place in (0, -1):
        values = {edge_of(row, separator, place) for row in rows}
        if any(not is_number(value) for value in values):
            return place
        numbers = {float(value) for value in values}
        is_whole = all(value == int(value) for value in numbers if math.isfinite(value))
        if len(numbers) > 1 and is_whole and len(numbers) <= max(len(rows) // 2, 2):
            candidates.append(place)
    if len(candidates) == 2:
        raise UserError(
            f"{source}: both the first and the last column can be the labels; name it label in the "
            "first row"
        )
    if not candidates:
        raise UserError(
            f"{source}: neither the first nor the last column can be the labels; name it label in "
            "the first row"
        )
    return candidates[0]


def to_squares(pixels: np.ndarray, source: str) -> np.ndarray:
    """Return float64[n,pixels] as grey images [n,side,side], or colours [n,side,side,3]."""
    count = pixels.shape[1]
    for channels in (1, 3):
        side = math.isqrt(count // channels)
        if side * side * channels == count:
            images = pixels.reshape(len(pixels), side, side, channels)
            return images if channels == 3 else images[..., 0]
    raise UserError(
        f"{source} has {count:,} pixels a row, which are not a square; give square images, such as "
        "784 pixels"
    )


# == Parquet, as Hugging Face's datasets have it ===================================================


def read_parquet(path: Path, size: tuple[int, int] | None) -> Arrays:
    """Return images `x` and labels `y` of a parquet file with a column of encoded pictures.

    Labels whose names the file knows become texts. Raises UserError without pyarrow, and for
    another table.
    """
    source = f"data={str(path)!r:.200}"
    try:
        import pyarrow.parquet  # optional: 40 MB
    except ImportError as error:
        raise UserError(
            f"{source} needs pyarrow, which is not installed; run `pip install pyarrow==14.0.2` "
            "or convert the file to an .npz"
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # pyarrow's own kinds
        raise UserError(f"{source} cannot be read ({briefly(error)}); restore it") from error
    columns = {name.lower(): name for name in table.column_names}
    labels = [name for name in (*LABEL_NAMES, "fine_label") if name in columns]
    images = [name for name in ("image", "img") if name in columns]
    if not labels or not images:
        raise UserError(
            f"{source} has the columns {', '.join(table.column_names):.100}; it needs image and "
            "label"
        )
    if not table.num_rows:
        raise UserError(f"{source} has no rows; restore it")
    cells = table.column(columns[images[0]]).to_pylist()
    contents = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    if not all(isinstance(content, bytes) for content in contents):
        raise UserError(f"{source}: its column {images[0]} does not hold pictures; convert it")
    found = np.array(table.column(columns[labels[0]]).to_pylist())
    names = class_names(table.schema.metadata or {}, columns[labels[0]])
    if names and found.dtype.kind in "iu" and found.min() >= 0 and found.max() < len(names):
        found = np.array(names)[found]
    return {"x": decode_pictures(contents, source, size), "y": found}


def class_names(metadata: dict[bytes, bytes], column: str) -> list[str]:
    """Return the names of the labels that Hugging Face's metadata has, none without them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def decode_pictures(
    contents: Sequence[bytes], source: str, size: tuple[int, int] | None
) -> np.ndarray:
    """Return encoded pictures of one size as uint8[n,H,W] or uint8[n,H,W,3]."""
    pictures = [decode(io.BytesIO(content), source, size, None) for content in contents]
    is_grey = all(mode in MODES_OF_GREY for _, mode in pictures)
    images = [picture for picture, _ in pictures]
    if not is_grey:
        images = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        sizes = " and ".join(f"{shape[0]}x{shape[1]}" for shape in sorted(shapes)[:2])
        raise UserError(
            f"{source} has pictures of several sizes, such as {sizes}; give one with --image-size "
            "32x32"
        )
    return np.stack(images)


# == A folder with a file per client ===============================================================


def read_client_files(folder: Path, source: str, read: Callable[[Path], dict[str, Any]]) -> Arrays:
    """Return the arrays of a folder of .npz files, one per client, with the owners.

    A client is called by its file's name. read(path) returns x_train, y_train, and x_test and
    y_test if the client has test images; the test set is all clients'.
    """
    paths = sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))
    if {"train", "test"} <= {path.stem.lower() for path in paths}:
        raise UserError(
            f"{source} has train.npz and test.npz, but files in a folder are clients; put their "
            f"arrays into one .npz, as {', '.join(KEYS)}"
        )
    pieces = [read(path) for path in paths]
    raw: Arrays = {}
    keys = ["x_train", "y_train"]
    with_tests = [piece for piece in pieces if "x_test" in piece]
    if with_tests:
        raw |= {key: join(key, with_tests, source) for key in ("x_test", "y_test")}
    raw |= {key: join(key, pieces, source) for key in keys}
    parts = [(piece["x_train"], piece["y_train"]) for piece in pieces]
    check_alike(parts, source, "clients")
    sizes = [len(piece["y_train"]) for piece in pieces]
    raw[OWNERS] = np.repeat([path.stem for path in paths], sizes)
    return raw


def join(key: str, pieces: Sequence[dict[str, Any]], source: str) -> np.ndarray:
    """Return the clients' arrays of one key, one after the other."""
    try:
        return np.concatenate([piece[key] for piece in pieces])
    except ValueError as error:
        raise UserError(
            f"{source}: the files' {key} have different shapes ({briefly(error)}); all must have "
            "one"
        ) from error
