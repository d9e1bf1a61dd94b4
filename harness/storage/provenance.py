"""Provenance: source, package versions, commit and processor of a run.

Flags say what a run is only as long as the program is the same. So a run's folder has
program.json, the list of the programs that made its rounds. A run that another program began is not
resumed, or read as a result, without a word.
"""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

from harness import SCRIPT
from harness.cli.fields import UserError
from harness.storage.files import read_json

import numpy as np

PROGRAMS = "program.json"  # in a run's folder
ROOT = Path(__file__).resolve().parents[2]
# The folders that numbers follow from, with the script; harness/__init__.py sets oneDNN.
FOLDERS = ("harness/config", "harness/engine", "harness/training", "variants")
COMPUTING = ("numpy", "scipy", "tensorflow", "tensorflow-federated")
# The vectors for which oneDNN has kernels of their own.
VECTORS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
# Where decorators of Python and TensorFlow, partial functions and dataclasses keep what they call.
WRAPPED = (
    *("__wrapped__", "__func__", "fget", "fset", "fdel", "python_function"),
    *("func", "args", "keywords", "dispatcher", "default_factory"),
)
# Members of every class that do nothing.
IDLE = {"__doc__", "__module__", "__annotations__"}


def read_sources() -> dict[str, bytes]:
    """Return file -> source of all that numbers follow from."""
    paths = [ROOT / SCRIPT, ROOT / "harness" / "__init__.py"]
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).glob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.is_file()}


# Read when this module is imported: a file may be edited while a notebook uses what it has loaded.
SOURCES = read_sources()
FILES = {str(ROOT / name) for name in SOURCES}


def meaning(node: Any) -> Any:
    """Return a syntax tree as nested lists, without docstrings; it has no layout and comments."""
    if isinstance(node, ast.AST):
        return [
            type(node).__name__,
            *[meaning(getattr(node, field, None)) for field in node._fields],
        ]
    if isinstance(node, list):
        return [meaning(item) for item in node if not is_text(item)]
    return repr(node)


def is_text(node: Any) -> bool:
    """Return whether a statement is a string that stands by itself, as docstrings do."""
    return (
        type(node) is ast.Expr
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@functools.cache
def hash_source(source: bytes | str) -> str:
    """Hash what a source does, or its text if it is not valid Python."""
    try:
        return digest(meaning(ast.parse(source)))
    except SyntaxError:
        return digest(repr(source))


def digest(content: Any) -> str:
    """Return sixteen digits of the SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def program() -> dict[str, dict[str, str]]:
    """Return everything other than flags that results depend on: `files` and `versions`.

    `files` maps file -> hash of its meaning, `versions` package -> version. A file that was edited
    after it was loaded counts as neither the old nor the new one.
    """
    now = read_sources()
    files = {name: hash_source(source) for name, source in SOURCES.items()}
    for name in edited(now):
        files[name] = digest([files[name], hash_source(now.get(name, b""))])
    return {"files": files, "versions": versions()}


@functools.cache
def versions() -> dict[str, str]:
    """Return package -> version, "unknown" if it was installed under another name."""
    found = {}
    for package in COMPUTING:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def edited(now: dict[str, bytes] | None = None) -> list[str]:
    """Return the files that have changed on the disk since they were loaded."""
    now = read_sources() if now is None else now
    return [name for name, source in SOURCES.items() if now.get(name) != source]


def file_hash(name: str) -> str:
    """Return the hash of what one file of the program does, such as "variants/partitions.py"."""
    return program()["files"][name]


def edited_notices() -> list[str]:
    """Return a notice on files that were edited after they were loaded."""
    names = edited()
    if not names:
        return []
    return [
        f"{', '.join(names)} changed on disk after loading; restart Python to be sure which code "
        "runs"
    ]


def hash_rows(rows: dict[str, Any]) -> dict[str, str]:
    """Return field -> hash of a choice's content, except functions of the program's own files.

    A notebook may put a number, or a function of its own, into a table. Functions that these call,
    or close over, are not examined, and neither are objects of other classes.
    """
    return {field: digest(row_content(row)) for field, row in rows.items()}


def row_content(thing: Any, outer: tuple[int, ...] = ()) -> Any:
    """Return the constants in a row, and the code of its functions that are in none of our files.

    It is JSON content, the same in every process: what has an address, or no order, is not written
    as such. `outer` are the ids of what contains the thing, which may contain itself.
    """
    if id(thing) in outer:
        return []
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return repr(thing)
    if isinstance(thing, np.generic | np.ndarray) and thing.dtype != object:
        return [str(thing.dtype), thing.shape, hashlib.sha256(thing.tobytes()).hexdigest()]
    parts = [row_content(part, (*outer, id(thing))) for part in parts_of(thing)]
    if isinstance(thing, set | frozenset):
        return sorted(json.dumps(part, sort_keys=True) for part in parts)
    if isinstance(thing, types.FunctionType) and not is_known(thing.__code__.co_filename):
        return [code_meaning(thing.__code__), *parts]
    return parts


def parts_of(thing: Any) -> list[Any]:
    """Return what a row, or a thing in it, is made of."""
    if isinstance(thing, tuple | list | set | frozenset):
        return [*thing]
    if isinstance(thing, dict):
        return [*thing.items()]
    if isinstance(thing, type):
        return [written_members(base) for base in thing.__mro__]
    if isinstance(thing, types.FunctionType) and not is_known(thing.__code__.co_filename):
        return [thing.__defaults__, thing.__kwdefaults__, vars(thing).get("__wrapped__")]
    own = getattr(thing, "__dict__", {})
    names = [name for name in WRAPPED if hasattr(type(thing), name) or name in own]
    return [getattr(thing, name) for name in names]


def written_members(kind: type) -> dict[str, Any]:
    """Return the members of a class; nothing of a class of ours or of a package."""
    module = sys.modules.get(kind.__module__)  # a notebook's own has no file
    if kind.__module__ == "builtins" or is_known(getattr(module, "__file__", None) or ""):
        return {}
    return {name: member for name, member in vars(kind).items() if name not in IDLE}


def is_known(file: str) -> bool:
    """Return whether a source file is one of the program, or of an installed package."""
    folders = [os.path.join(prefix, "") for prefix in (sys.prefix, sys.base_prefix)]
    return file in FILES or file.startswith(tuple(folders))


def code_meaning(code: types.CodeType) -> list[Any]:
    """Return what compiled code does, as JSON content: its instructions, names and constants."""
    constants = [constant_meaning(constant) for constant in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def constant_meaning(constant: Any) -> Any:
    """Return a constant of compiled code as JSON content, that of a set in a fixed order."""
    if isinstance(constant, types.CodeType):
        return code_meaning(constant)
    if isinstance(constant, frozenset):  # `x in {"a", "b"}`
        return sorted(map(repr, constant))
    return repr(constant)


def describe_program(rows: dict[str, str]) -> dict[str, Any]:
    """Return what program.json holds of this program; the commit and the processor are for people.

    `rows` are those of `hash_rows`.
    """
    return {**program(), "rows": rows, "commit": commit(), "processor": processor()}


def describe_provenance(since: float | None) -> dict[str, Any]:
    """Return how a result was made: date, command, code, machine and duration.

    `since` is perf_counter() at the start of the run, or None for a private run, whose date and
    duration are withheld.
    """
    name = commit()
    about: dict[str, Any] = {
        "command": shlex.join(sys.orig_argv),
        "commit": name and name.removesuffix("-dirty"),
        "clean": name and not name.endswith("-dirty"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": ", ".join(f"{package} {number}" for package, number in versions().items()),
    }
    if since is not None:
        now = datetime.datetime.now(datetime.UTC)
        about["date"] = now.isoformat(timespec="seconds")
        about["seconds"] = round(time.perf_counter() - since, 1)
    return about


def same_program(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two descriptions are of one program, whatever commit or processor it was."""
    return all(one.get(kind) == other.get(kind) for kind in ("files", "versions", "rows"))


def program_hash(described: dict[str, Any]) -> str:
    """Return what a checkpoint names the program by that made it."""
    return digest([described.get(kind) for kind in ("files", "versions", "rows")])


def read_programs(folder: Path) -> list[dict[str, Any]]:
    """Return the descriptions in a run's program.json.

    Raises UserError if it holds something else.
    """
    programs = read_json(folder / PROGRAMS).get("programs")
    kinds = {"files": dict, "versions": dict, "rows": dict, "processor": str, "from_round": int}
    good = isinstance(programs, list) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(name), kind) for name, kind in kinds.items())
        for one in programs
    )
    if not good or not programs:
        raise UserError(
            f"{folder / PROGRAMS} does not name the program that made the run; restore the file"
        )
    return programs


def changed(saved: dict[str, Any], rows: dict[str, str]) -> list[str]:
    """Return the files, packages and rows in which this program differs from one described before,
    sorted."""
    names = []
    for kind, ours in {**program(), "rows": rows}.items():
        theirs = saved.get(kind) or {}
        names += [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
    return sorted(name if name.isprintable() else ascii(name) for name in names)


@functools.cache
def commit() -> str | None:
    """Return the commit of the project's repository, with "-dirty" if the code differs, or None."""
    try:
        top = git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != ROOT:
            return None
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--", *SOURCES) else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def git(*words: str) -> str:
    """Return what git prints in the project's folder. Raises OSError or SubprocessError."""
    done = subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


@functools.cache
def processor() -> str:
    """Return the processor's name, and the vectors by which last bits of sums may differ."""
    with open("/proc/cpuinfo") as file:
        about = dict(re.split(r"\s*:\s*", line.strip(), maxsplit=1) for line in file if ":" in line)
    flags = about.get("flags", "").split()
    vectors = next((name for flag, name in VECTORS.items() if flag in flags), "SSE")
    return (
        f"{about.get('model name', 'x86-64')} with {vectors}, {len(os.sched_getaffinity(0))} cores"
    )
