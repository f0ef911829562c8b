"""Writing that loses nothing: output is built aside and takes its name only when it is whole."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError, TitansError

ASIDE = ".tmp"  # how the name of what is being written ends


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
def _aside(target: Path, make: Callable[[Path, str], Path]) -> Iterator[Path]:
    """What `make` makes beside the target; locked, so that it is told from what a killed process has left."""
    _remove_abandoned(target)
    while True:
        aside = make(target.parent, f".{target.name}.")
        handle = os.open(aside, os.O_RDONLY)
        with suppress(OSError):  # there are file systems without locks; nothing is removed there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if aside.exists():
            break
        os.close(handle)  # another process came between and took it for an abandoned one
    try:
        yield aside
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{ASIDE}"):
        with suppress(OSError):  # its writer lives, or it is not ours to remove
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def _make_file(folder: Path, prefix: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=ASIDE, dir=folder)
    os.close(handle)
    return Path(name)


def _make_folder(folder: Path, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=ASIDE, dir=folder))


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A path to write to; it replaces `target` when the block ends without an error, else it is removed.

    What a killed process was writing for the same target is removed too.
    """
    try:
        with _aside(target, _make_file) as aside:
            try:
                yield aside
                aside.chmod(0o666 & ~_umask())
                _sync(aside)
                aside.replace(target)
                with suppress(PermissionError):  # of a folder that may be written but not read
                    _sync(target.parent)
            finally:
                aside.unlink(missing_ok=True)
    except TitansError:  # some are also FileNotFoundError
        raise
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
    its name. What may be overwritten is what `check_output` lets pass, before the block and once more after it. What a
    killed process was writing for the same target is removed.
    """
    target = target.resolve()
    check_output(target, overwrite, marker)
    try:
        with _aside(target, _make_folder) as aside:
            try:
                yield aside
                for path in (*aside.iterdir(), aside):
                    _sync(path)
                aside.chmod(0o777 & ~_umask())
                check_output(target, overwrite, marker)
                if target.exists():
                    _exchange(aside, target)
                else:
                    aside.rename(target)
                with suppress(PermissionError):  # of a folder that may be written but not read
                    _sync(target.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except TitansError:  # some are also FileNotFoundError
        raise
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
