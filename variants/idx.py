"""IDX files, the format of MNIST: four per set, gzipped or not, under several names."""

from __future__ import annotations

import gzip
import os
import re
import stat
from pathlib import Path

from harness.cli.fields import UserError

import numpy as np

# Such as train-images-idx3-ubyte.gz, as torchvision has it; train-images.idx3-ubyte, as Kaggle;
# emnist-letters-test-labels-idx1-ubyte: the set, the part, what it holds.
NAME = re.compile(
    r"(?P<set>.*?)[-_.]?(?P<part>train|t10k|test)[-_.](?P<kind>images|labels)[-_.]idx[13][-_.]ubyte"
    r"(\.gz)?"
)
DEEPEST = 3  # folders below the one that is named: torchvision's are in MNIST/raw
MOST_BYTES = 2**33  # of an array
MOST_RANKS = 4
KEYS = {
    "x_train": "train images",
    "y_train": "train labels",
    "x_test": "test images",
    "y_test": "test labels",
}


def names_set(path: Path) -> bool:
    """Return whether `path` is a folder, or what the files of a set in its folder begin with."""
    try:
        if path.is_dir():
            return True
        if path.exists():
            return NAME.fullmatch(path.name) is not None
        names = os.listdir(path.parent)
    except OSError:  # a name that is too long, a folder that may not be read: reading it says so
        return False
    return any(name.startswith(path.name) and NAME.fullmatch(name) for name in names)


def read_set(path: Path, source: str) -> dict[str, np.ndarray]:
    """Return x_train, y_train, x_test and y_test of the IDX files in a folder, or below it.

    If it has several sets, `path` is the folder and what the names of one's files begin with; one
    of these files will do. `source` is what errors call it. Raises UserError.
    """
    folder = path if path.is_dir() else path.parent
    found = NAME.fullmatch(path.name)
    wanted = "" if path.is_dir() else (found["set"] if found else path.name)
    sets = find_sets(folder, source)
    names = sorted(name for name in sets if name.startswith(wanted))
    if wanted in names:
        names = [wanted]
    if not names:
        raise UserError(
            f"{source} contains no data; give a folder with the four IDX files, such as "
            "train-images-idx3-ubyte, with a folder of pictures for each class, or with a .npz for "
            "each client"
        )
    if len(names) > 1:
        shown = ", ".join(names)
        raise UserError(
            f"{source} contains {len(names)} sets of IDX files, {shown:.200}; choose one, such as "
            f"--data {folder / names[0]}"
        )
    files = sets[names[0]]
    for what in KEYS.values():
        if what not in files:
            raise UserError(
                f"{source} contains no IDX file of the {what}; give a folder with all four, such "
                "as train-images-idx3-ubyte"
            )
    return {key: read_file(files[what]) for key, what in KEYS.items()}


def find_sets(folder: Path, source: str) -> dict[str, dict[str, Path]]:
    """Return set -> "train images" and so on -> file, of the uppermost folders that have sets.

    A set is called by its folder below `folder` and what its files' names begin with. Of a file
    twice, plain and gzipped, the plain one counts.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror}); give a folder with the four IDX files"
        ) from error
    by_depth: dict[int, dict[str, dict[str, Path]]] = {}
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        if len(below.parts) == DEEPEST:
            folders.clear()
        if NAME.fullmatch(below.name):  # Kaggle's has a folder for each file, with the file's name
            below = below.parent
        for name in sorted(files):  # a plain name comes before the same with .gz
            found = NAME.fullmatch(name)
            if found and not name.startswith("."):  # macOS puts ._NAME beside NAME
                sets = by_depth.setdefault(len(below.parts), {})
                path = below / found["set"]
                members = sets.setdefault(str(path) if path.parts else "", {})
                part = "train" if found["part"] == "train" else "test"
                members.setdefault(f"{part} {found['kind']}", Path(place, name))
    return by_depth[min(by_depth)] if by_depth else {}


def read_file(path: Path) -> np.ndarray:
    """Return the array of an IDX file of bytes. Raises UserError if it is none, or cut.

    No more is read than its header says: a gzipped file may hold more than any memory.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, without end
            raise OSError(0, "not a regular file")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            is_idx = len(head) == 4 and head[:3] == b"\0\0\x08" and head[3] <= MOST_RANKS
            ranks = head[3] if is_idx else 0
            sizes = file.read(4 * ranks)
            shape = np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist()
            length = int(np.prod(shape, dtype=object))
            content = file.read(length + 1) if length <= MOST_BYTES else b""
    except Exception as error:
        reason = getattr(error, "strerror", None) or "damaged gzip"
        raise UserError(f"{path} cannot be read ({reason}); restore it") from error
    if length > MOST_BYTES:
        raise UserError(f"{path} claims to contain {length / 1e9:,.0f} GB; the limit is 8")
    if ranks == 0 or len(shape) < ranks or len(content) != length:
        raise UserError(f"{path} is not a complete IDX file of bytes; restore it")
    return np.frombuffer(content, np.uint8).reshape(shape)
