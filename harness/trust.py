"""Model files that this user has run before; a run's folder from elsewhere is data, not code.

Its config.json may name a Python file as the model. That file runs only if the user names it with
--model, or has run a file with this very content before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from harness.fields import UserError
from harness.files import append, expand_path, read_bytes


def list_path() -> Path:
    """Return the file with the SHA-256 of each model file that was run, a line each."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return expand_path(state) / "federated_learning" / "model_files.txt"


def known_hashes() -> set[str]:
    """Return the hashes in the list; none if it cannot be read."""
    try:
        return set(read_bytes(list_path()).decode(errors="replace").split())
    except OSError:
        return set()


def remember(digest: str) -> None:
    """Add the SHA-256 of a model file that is run to the list, if the list can be written."""
    if digest in known_hashes():
        return
    with contextlib.suppress(OSError, UserError):
        list_path().parent.mkdir(parents=True, exist_ok=True)
        append(list_path(), f"{digest}\n")


def check_model(model: str, source: str) -> None:
    """Raise UserError if `model`, named by the file `source`, is a Python file not run before.

    A built-in name such as lean-cnn passes.
    """
    file, is_file, _ = model.rpartition(".py:")
    if not is_file:
        return
    path = expand_path(f"{file}.py")
    try:
        digest = hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise UserError(
            f"{source} uses the model {model!r:.200}, which cannot be read ({error.strerror}); "
            "give the file with --model FILE.py:FUNCTION"
        ) from error
    if digest not in known_hashes():
        raise UserError(
            f"{source} uses the Python file {str(path)!r:.200} as its model, which you have not "
            "run before; read it, then allow it with --model FILE.py:FUNCTION"
        )
