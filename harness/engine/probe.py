"""Probe of a machine: can it hold shards and run TFF's worker? Creates the folder for them.

    python3 -IS probe.py MARK FOLDER OLDEST_GLIBC

It is a program of its own, for a bare Python. It prints one line of JSON, after MARK: `wrong`, what
forbids it, or an empty text; `folder`, where it really is, without links; and `binary`, the SHA-256
of the worker that is there already, or an empty text.

Whoever may write the folder could have us run a program of his, and whoever may read it sees the
clients' images. So the folder and all above it belong to us or to root, and nobody else may write
them, as sshd wants it of its keys. In a folder like /tmp, where only the owner may rename what is
his, others may write. What is checked is the folder without links, and that is used from then on.
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import stat
import sys

BINARY = "worker_binary"
OURS = (BINARY, "shards-", f".{BINARY}.", ".rsync")  # what the names there begin with
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000


def with_parents(path):
    """Return the path and the folders above it, the uppermost first."""
    paths = [path]
    while os.path.dirname(paths[0]) != paths[0]:
        paths.insert(0, os.path.dirname(paths[0]))
    return paths


def trouble_with_owner(path):
    """Return why what stands at `path`, itself no link's target, is not ours to trust, or None."""
    owner = os.lstat(path).st_uid
    if owner not in (0, os.getuid()):
        return f"{path} belongs to another user (uid {owner}), who could place a program there"
    return None


def trouble_with_access(path, is_parent):
    """Return why others could change what is in the folder, or None."""
    mode = os.stat(path).st_mode
    if mode & OTHERS_WRITE and not (is_parent and mode & stat.S_ISVTX):
        return f"others may write {path} (mode {stat.S_IMODE(mode):o}); run `chmod go-w` on it"
    return None


def trouble_with_readers(real):
    """Return why the folder cannot be closed to others, or None; close it if it is for us alone."""
    mode = stat.S_IMODE(os.stat(real).st_mode)
    if not mode & 0o077:
        return None
    others = [name for name in os.listdir(real) if not name.startswith(OURS)]
    if others:
        return (
            f"{real} contains other files, and others may read it (mode {mode:o}); run `chmod "
            "go-rwx` on it"
        )
    os.chmod(real, 0o700)
    return None


def make_folder(folder):
    """Make the folder, for us alone; return what forbids its use, or an empty text."""
    choose = "choose another --workers-cache"
    path = os.path.join(os.getcwd(), folder)
    real = os.path.realpath(path)
    umask = os.umask(0o077)  # for the folders above it too
    try:
        os.makedirs(real, exist_ok=True)
        paths = with_parents(path) + with_parents(real)
        paths += [os.path.join(real, name) for name in os.listdir(real)]
        # A file of another run's transfer may have got its name since it was listed.
        troubles = [trouble_with_owner(path) for path in paths if os.path.lexists(path)]
        troubles += [trouble_with_access(path, path != real) for path in with_parents(real)]
        troubles = [trouble for trouble in troubles if trouble]
        if troubles:
            return f"{troubles[0]}, or {choose}"
        if not os.access(real, os.W_OK | os.X_OK):
            return f"cannot write {real}; {choose}"
        trouble = trouble_with_readers(real)
        if trouble:
            return f"{trouble}, or {choose}"
    except OSError as error:
        return f"cannot make {real} ({error.strerror}); {choose}"
    finally:
        os.umask(umask)
    return ""


def hash_binary(folder):
    """Return the SHA-256 of the worker in the folder, or an empty text if there is none."""
    path = os.path.join(folder, BINARY)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return ""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1 << 20), b""):
                digest.update(part)
        return digest.hexdigest()
    except OSError:
        return ""


def find_trouble(oldest):
    """Return what of the machine forbids TFF's worker, or an empty text."""
    name, version = platform.libc_ver()
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"is {sys.platform} on {platform.machine()}; TFF's worker needs Linux on x86-64"
    if name != "glibc" or to_numbers(version) < to_numbers(oldest):
        return f"has {name or 'no glibc'} {version}; TFF's worker needs glibc {oldest} or later"
    if shutil.which("rsync") is None:
        return "has no rsync; install it there"
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET):
        return (
            "does not allow network namespaces, without which other users of the host could "
            "reach TFF's worker; allow them (sysctl kernel.unprivileged_userns_clone=1 or "
            "user.max_user_namespaces), or remove the host"
        )
    return ""


def to_numbers(version):
    """Return (2, 29) of "2.29"."""
    return tuple(int(number) for number in version.split(".")[:2])


def main(mark, folder, oldest):
    """Print the answer."""
    wrong = make_folder(folder)
    real = os.path.realpath(folder)
    answer = {"wrong": find_trouble(oldest) or wrong, "folder": real, "binary": hash_binary(real)}
    print("\n" + mark + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
