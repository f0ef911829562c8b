"""Writing that loses nothing: output is built aside and takes its name only when it is whole."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def _explain(target: Path, error: OSError) -> OutputError:
    remedy = {
        errno.ENOSPC: "free some space or choose another place",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder you may write to",
        errno.ENOENT: "create the folder first",
    }.get(error.errno or 0, "choose another place")
    return OutputError("output", f"to write {target}", error.strerror or str(error), remedy)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A path to write to; it replaces `target` when the block ends without an error, else it is removed."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            aside.chmod(0o666 & ~_umask())
            _sync(aside)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise _explain(target, error) from error


def check_output(target: Path, overwrite: bool, marker: str) -> None:
    """Finds what would keep a folder from becoming `target`, before any work is done for it. Raises OutputError.

    Only a folder that holds a file named `marker` is ever overwritten, so that a slip of the hand costs nothing else.
    """
    if target.exists() and not overwrite:
        raise OutputError("output", f"{target} not to exist", "an existing one", "give another name or --overwrite")
    if target.exists() and not (target / marker).is_file():
        raise OutputError("output", f"{target} to hold {marker}", "something else there", "give another name")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise _explain(target, error) from error


@contextmanager
def replacing_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """A folder to fill; it becomes `target` when the block ends without an error, else it is removed.

    An existing target changes places with the new folder in one step, so at every moment one of the two is whole under
    its name. What may be overwritten is what `check_output` lets pass, before the block and once more after it.
    """
    target = target.resolve()
    check_output(target, overwrite, marker)
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield aside
            for path in aside.iterdir():
                _sync(path)
            aside.chmod(0o777 & ~_umask())
            check_output(target, overwrite, marker)
            if target.exists():
                _exchange(aside, target)
            else:
                aside.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise _explain(target, error) from error


def _exchange(a: Path, b: Path) -> None:
    """Makes two folders change places in one step (Linux), or in two where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    aside = a.with_name(a.name + ".old")
    b.rename(aside)
    try:
        a.rename(b)
    except OSError:
        aside.rename(b)
        raise
    aside.rename(a)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
