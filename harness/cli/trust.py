"""Python files that this user has run before; a run's folder from elsewhere is data, not code.

Its config.json may name a Python file as the model, or as another part. That file runs only if the
user names it with the flag, or has run a file with this very content before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from harness.cli.fields import UserError
from harness.storage.files import append, expand_path, read_bytes


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
        digest = hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise UserError(
            f"{source} uses the {field} {name!r:.200}, which cannot be read ({error.strerror}); "
            f"give the file with {cure}"
        ) from error
    if digest not in known_hashes():
        raise UserError(
            f"{source} uses the Python file {str(path)!r:.200} as its {field}, which you have not "
            f"run before; read it, then allow it with {cure}"
        )
