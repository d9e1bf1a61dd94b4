"""Python files that this user has run before; a run's folder from elsewhere is data, not code.

Its config.json may name a Python file as the model, or as another part. That file runs only if the
user names it with the flag, or has run a file with this very content before. The files next to it
that it imports are part of its content.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from harness.cli.fields import UserError
from harness.storage.files import append, expand_path, read_bytes

MODULES = (".py", ".so", ".pyc")  # that Python imports
PASSED_OVER = {"__pycache__", "site-packages"}  # what is compiled, and an environment's packages
OURS = {"federated_learning", "harness", "variants"}  # an import by these names gives this program


def read_with_imports(path: Path) -> dict[Path, bytes]:
    """Return file -> content of a Python file, and of those in its folder that it imports, in turn.

    An import by a name that is made at run time is not found. Raises OSError for a file that cannot
    be read.
    """
    found: dict[Path, bytes] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = read_bytes(file)
            waiting += imports_nearby(found[file], path.parent)
    return found


def imports_nearby(source: bytes, folder: Path) -> list[Path]:
    """Return the files in `folder` that a source imports; of a package all files in it."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):  # which is told where the file is run
        return []
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found = []
    for name in sorted({name.partition(".")[0] for name in names} - OURS):
        found += [folder / f"{name}{ending}" for ending in MODULES]
        for file in sorted((folder / name).rglob("*")):
            parts = {*file.relative_to(folder).parts}
            if file.suffix in MODULES and not PASSED_OVER & parts:
                found.append(file)
    return [file for file in found if file.is_file()]


def hash_files(contents: Mapping[Path, bytes]) -> str:
    """Return the SHA-256 of a file; of several that of their names and hashes, in any folder."""
    hashes = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    if len(hashes) == 1:
        return hashes[0]
    folder = os.path.commonpath([file.parent for file in contents])
    lines = [
        f"{digest} {file.relative_to(folder)}"
        for digest, file in zip(hashes, contents, strict=True)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def list_path() -> Path:
    """Return the file with the SHA-256 of each Python file that was run, a line each."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return expand_path(state) / "federated_learning" / "model_files.txt"


def known_hashes() -> set[str]:
    """Return the hashes in the list; none if it cannot be read."""
    try:
        return set(read_bytes(list_path()).decode(errors="replace").split())
    except OSError:
        return set()


def remember(digest: str) -> None:
    """Add the SHA-256 of a Python file that is run to the list, if the list can be written."""
    if digest in known_hashes():
        return
    with contextlib.suppress(OSError, UserError):
        list_path().parent.mkdir(parents=True, exist_ok=True)
        append(list_path(), f"{digest}\n")


def check_file(field: str, name: str, source: str) -> None:
    """Raise UserError if a choice, named by the file `source`, is a Python file not run before.

    A built-in name such as lean-cnn passes. `field` is what is chosen, such as "model".
    """
    file, is_file, _ = name.rpartition(".py:")
    if not is_file:
        return
    path = expand_path(f"{file}.py")
    cure = f"--{field} FILE.py:FUNCTION"
    try:
        digest = hash_files(read_with_imports(path.absolute()))
    except OSError as error:
        raise UserError(
            f"{source} uses the {field} {name!r:.200}, which cannot be read ({error.strerror}); "
            f"give the file with {cure}"
        ) from error
    if digest not in known_hashes():
        raise UserError(
            f"{source} uses the Python file {str(path)!r:.200} as its {field}, which you have not "
            f"run before; read it, and the files that it imports, then allow it with {cure}"
        )
