"""Files: atomic writing, appending, locking; texts as JSON and CSV."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import itertools
import json
import math
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError

TEMPORARY_BYTES = 50_000  # AutoGraph writes ten files of some kilobytes


def expand_path(path: str) -> Path:
    """Return the path that a flag names; a `~` that is nobody's home is a name like any other."""
    return Path(os.path.expanduser(path))


def read_bytes(path: Path) -> bytes:
    """Return what is in a regular file.

    Raises OSError for anything else: a pipe would be waited for, without end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(descriptor, "rb") as file:
        return file.read()


@contextlib.contextmanager
def io_errors_as_user_errors(path: Path, flag: str = "") -> Iterator[None]:
    """Turn a failure to write `path` (disk full, read-only, gone) into one line that names it, and
    the `flag` that chooses another folder."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str | bytes) else path
        reason = f"cannot write {os.fsdecode(name)}: {error.strerror or error}"
        by_flag = f" with {flag}" if flag else ""
        cure = f"free some space, or choose another folder{by_flag}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            cure = f"choose a writable folder{by_flag}"
        raise UserError(f"{reason}; {cure}") from error


def check_temporary_folder() -> None:
    """Raise UserError if TMPDIR has no room for what TensorFlow and Keras write there."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(TEMPORARY_BYTES))
    except OSError as error:
        folder = os.environ.get("TMPDIR", "/tmp")
        raise UserError(
            f"cannot write into {folder} ({error.strerror}), where TensorFlow keeps compiled "
            "functions; free some space there, or set TMPDIR to another folder"
        ) from error


def check_clock() -> None:
    """Raise UserError if the clock is outside 1980 to 2107, which .keras files and checkpoints can
    hold."""
    now = time.localtime()
    if not 1980 <= now.tm_year <= 2107:
        raise UserError(
            f"the clock says {time.strftime('%Y-%m-%d', now)}, a date that zip files such as "
            "global_model.keras cannot store; set it"
        )


def write_file(path: Path, data: bytes | str, sync: bool = False, flag: str = "") -> None:
    """Make `path` hold all of `data`, or what it held before, whenever we are killed; with `sync` a
    power cut too.

    `flag` is what chooses another folder. The name that is written first cannot be guessed, and a
    link in its place is not followed: in a folder that others can write, nobody leads us to another
    file.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    with io_errors_as_user_errors(path, flag):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            try:
                write_all(descriptor, to_utf_8(data) if isinstance(data, str) else data)
                if sync:
                    flush(descriptor)
            finally:
                os.close(descriptor)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_files(folder: Path, contents: Mapping[str, bytes | str]) -> list[Path]:
    """Write name -> content into a folder; return the paths."""
    for name, content in contents.items():
        write_file(folder / name, content)
    return [folder / name for name in contents]


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there, in one that is."""
    with io_errors_as_user_errors(folder):
        folder.mkdir(exist_ok=True)


def to_utf_8(text: str) -> bytes:
    """Encode a text; bytes of file names that are not UTF-8 become "?"."""
    return text.encode(errors="replace")


def flush(descriptor: int) -> None:
    """Have the file's content on the disk, where its file system can say so."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # as some of FUSE's
            raise


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; a disk that fills up takes a part of it first."""
    while data:
        data = data[os.write(descriptor, data) :]


def append(path: Path, text: str, sync: bool = False) -> None:
    """Add `text` to the file; where that fails half-way, the file is as it was.

    `sync` is against a power cut.
    """
    with io_errors_as_user_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        size = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, to_utf_8(text))
            if sync:
                flush(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
        finally:
            os.close(descriptor)


def numbered(folder: Path) -> Iterator[Path]:
    """Yield `folder`, and then its name with -2, -3, ... at the end."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def briefly(error: BaseException) -> str:
    """Shorten an error message to one line."""
    return (
        " ".join(f"{getattr(error, 'strerror', None) or error}".split())[:80]
        or type(error).__name__
    )


def reason_of(error: BaseException) -> str:
    """Return what an error of a user's code, or of TensorFlow in it, says in one line."""
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "in user code:" in lines:  # AutoGraph's: a traceback, and the error itself below it
        said = [line for line in lines if re.match(r"[\w.]+(: |$)", line)]
        lines = [line.removeprefix(f"{kind}: ") for line in said[-1:]]
    elif len(lines) > 1 and lines[0].startswith("Exception encountered when calling layer"):
        lines = lines[1:2]
    return " ".join(lines).partition(" for '{{")[0][:200] or kind


class InUse(UserError):
    """Another process has the folder of a run."""


@contextlib.contextmanager
def lock(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the run's folder exclusively.

    Raises InUse if another run holds it. Without locks in the file system, it calls tell(notice).
    """
    with io_errors_as_user_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InUse(f"{folder} is in use by another run; wait for it to finish") from error
            tell(
                f"cannot lock {folder} ({error.strerror}): two runs writing to it would corrupt "
                "each other, so do not start a second one"
            )
        yield
    finally:
        os.close(descriptor)


def strict(content: Any) -> Any:
    """Return `content` with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        return {name: strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def to_json(content: Any) -> str:
    """Return indented JSON, but a list of numbers on one line."""
    text = json.dumps(strict(content), indent=1, allow_nan=False)
    texts_and_lists = r'"(?:\\.|[^"\\])*"|\[[-\d\s,.eE+]*\]'

    def shortened(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith('"') else " ".join(found[0].split())

    return re.sub(texts_and_lists, shortened, text) + "\n"


def json_line(content: Any) -> str:
    """Return JSON on one line, with its end."""
    return json.dumps(strict(content), allow_nan=False) + "\n"


def read_json(path: Path, cure: str = "give the folder of a run") -> dict[str, Any]:
    """Return the JSON object in `path`. Raises UserError, with the cure, if there is none."""
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UserError(f"cannot read {path} ({reason}); {cure}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object; {cure}")
    return content


def one_line(text: str) -> str:
    """Return a text without line ends and characters that steer a terminal.

    Names of files and of data may have any.
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def csv_line(values: Iterable[Any]) -> str:
    """Return one line of a CSV file, with its end. A text that a spreadsheet takes for a formula
    gets a ' before it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(csv_value, values))
    return text.getvalue()


def csv_value(value: Any) -> Any:
    """Return a value as it is in a CSV file.

    An infinity is NaN: JSON, from which a resumed run makes its tables again, has none.
    """
    if isinstance(value, float) and math.isinf(value):
        return math.nan
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def read_lines(path: Path) -> list[str]:
    """Return the lines of a table, none where it is missing or cannot be read."""
    try:
        return read_bytes(path).decode().splitlines()
    except (OSError, ValueError):
        return []


def csv_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return a CSV file's text: all names of the rows, in their order, then the values of each.

    A value that a row does not have is empty, as None is.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[row.get(name) for name in names] for row in rows]
    return "".join(map(csv_line, [names, *lines] if rows else []))
