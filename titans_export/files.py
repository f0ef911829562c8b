"""Atomic output: files and folders get a temporary name and are renamed into place."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError, TitansError, os_error_fix

ASIDE = ".tmp"  # suffix of temporary output


def _explain(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError("E1001", "output", f"cannot write {target}: {reason}", os_error_fix(error))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _aside(target: Path, make: Callable[[Path, str], Path]) -> Iterator[Path]:
    """Temporary output beside the target. A lock marks it as live; unlocked output is stale, from a killed process."""
    _remove_abandoned(target)
    while True:
        aside = make(target.parent, f".{target.name}.")
        handle = os.open(aside, os.O_RDONLY)
        with suppress(OSError):  # some file systems have no locks; stale output stays there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if aside.exists():
            break
        os.close(handle)  # another process removed it as stale
    try:
        yield aside
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{ASIDE}"):
        with suppress(OSError):  # its writer is running, or removal is not permitted
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
    """Yields a temporary path. It replaces `target` if the block succeeds, and is removed otherwise.

    Also removes stale temporary output of the same target. Raises OutputError.
    """
    _check_kind(target)
    try:
        with _aside(target, _make_file) as aside:
            try:
                yield aside
                aside.chmod(0o666 & ~_umask())
                _sync(aside)
                aside.replace(target)
                with suppress(PermissionError):  # the folder may be writable but not readable
                    _sync(target.parent)
            finally:
                aside.unlink(missing_ok=True)
    except TitansError:  # some are also FileNotFoundError
        raise
    except OSError as error:
        raise _explain(target, error) from error


def check_file(target: Path | None) -> None:
    """Checks that `replacing_file` can write `target`, before any work is done. None is no file. Raises OutputError."""
    if target is None:
        return
    _check_kind(target)
    if not target.parent.is_dir():
        raise OutputError("E1007", "output", f"no such folder: {target.parent}", "create the folder first")
    _try(target, _make_file)


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A name of the same file or folder for libraries that take UTF-8 only, valid within the block.

    It is the path itself if that is UTF-8, else a name of this process's open file, or of one beside it.
    """
    with suppress(UnicodeEncodeError):
        os.fspath(path).encode()
        yield os.fspath(path)
        return
    try:
        path.name.encode()
    except UnicodeEncodeError:
        opened, rest = path, ""
    else:
        opened, rest = path.parent, f"/{path.name}"
    handle = os.open(opened, os.O_PATH if opened.is_dir() else os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}{rest}"
    finally:
        os.close(handle)


def check_output(target: Path, overwrite: bool, marker: str, *, source: Path | None = None, needs: int = 0) -> None:
    """Checks that a folder may become `target`, before any work is done. Raises OutputError.

    Only a folder that holds a file named `marker` may be overwritten, which protects other folders from typos. source:
    the input. It must not lie inside of `target`, nor `target` inside of a bundle. needs: bytes that must be free.
    """
    target = _resolved(target)
    if target.exists() and not overwrite:
        raise OutputError("E1008", "output", f"{target} exists", "give another name or --overwrite")
    if target.exists() and not (target / marker).is_file():
        raise OutputError("E1009", "output", f"{target} has no {marker} and is not replaced", "give another name")
    if target.exists() and _is_mount_point(target):
        problem = f"{target} is a mount point and cannot be replaced"
        raise OutputError("E1011", "output", problem, "give the name of a new folder inside of it")
    if source is not None and (source := source.resolve()) != target:
        if source.is_relative_to(target):
            problem = f"{target} cannot be replaced: the input {source} lies inside of it"
            raise OutputError("E1011", "output", problem, "give another name")
        if target.is_relative_to(source) and (source / marker).is_file():
            problem = f"{target} lies inside of the bundle that is read, {source}"
            raise OutputError("E1011", "output", problem, "give a name outside of it")
    _check_sticky(target)
    _try(target, _make_folder)
    free = shutil.disk_usage(target.parent).free
    if free < needs:
        problem = f"too little space for {target}: expected at least {needs:,} bytes, got {free:,}"
        raise OutputError("E1010", "output", problem, "free some space or choose another place")


def _resolved(target: Path) -> Path:
    try:
        return target.resolve()
    except (OSError, RuntimeError):  # links that lead to each other
        raise OutputError("E1001", "output", f"cannot resolve the path {target}", "check its links") from None


def _is_mount_point(path: Path) -> bool:
    """Also for a folder that is mounted from the same file system, as containers do, which Path.is_mount misses."""
    if path.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    escaped = (line.split(b" ")[4] for line in lines)
    points = (re.sub(rb"\\(\d{3})", lambda found: bytes([int(found[1], 8)]), point) for point in escaped)
    return os.fsencode(path) in points


def _check_kind(target: Path) -> None:
    """Refuses to replace folders, devices and pipes by a file. Root may replace even /dev/null."""
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "a device or a pipe"
        raise OutputError("E1011", "output", f"{target} is {what}, not a file", "give the name of a file")


def _check_sticky(target: Path) -> None:
    """In a folder such as /tmp, only its owner may rename another user's folder."""
    if not target.exists() or os.geteuid() == 0:
        return
    parent = target.parent.stat()
    if parent.st_mode & stat.S_ISVTX and os.geteuid() not in (parent.st_uid, target.stat().st_uid):
        problem = f"cannot write {target}: it belongs to another user"
        raise OutputError("E1001", "output", problem, "give another name")


def _try(target: Path, make: Callable[[Path, str], Path]) -> None:
    """Makes temporary output like that of `target`, and removes it."""
    try:
        aside = make(target.parent, f".{target.name}.")
        with suppress(FileNotFoundError):  # another writer of the target took it for stale output
            aside.rmdir() if aside.is_dir() else aside.unlink()
    except OSError as error:
        raise _explain(target, error) from error


@contextmanager
def replacing_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields a temporary folder. It becomes `target` if the block succeeds, and is removed otherwise.

    An existing target and the new folder are exchanged atomically, so `target` is complete at every moment.
    `check_output` runs before and after the block. Stale temporary output of the same target is removed. Raises
    OutputError.
    """
    target = _resolved(target)
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
                with suppress(PermissionError):  # the folder may be writable but not readable
                    _sync(target.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except TitansError:  # some are also FileNotFoundError
        raise
    except OSError as error:
        raise _explain(target, error) from error


def _exchange(a: Path, b: Path) -> None:
    """Exchanges two folders, in one step on Linux, or in two steps if the file system does not support that."""
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
