"""What a command trusts in the bundles that it opens: their SHA-256, and operators of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BundleError

if TYPE_CHECKING:
    from .manifest import Manifest


@dataclass(frozen=True)
class Trust:
    """expected: SHA-256 of the bundles that may be opened; empty: any. any_operator: graphs may have any operator."""

    expected: frozenset[str] = frozenset()
    any_operator: bool = False

    def session_options(self, bundle: Path) -> dict[str, Any]:
        """Arguments of `titans_runtime.Session` for that bundle. Raises BundleError for an unexpected one."""
        if len(self.expected) < 2:
            return {**self.operators, "expect_sha256": next(iter(self.expected), None)}
        from .manifest import read_manifest

        return {**self.operators, "expect_sha256": self.check(bundle, read_manifest(bundle))}

    @property
    def operators(self) -> dict[str, Any]:
        """The argument of `titans_runtime.Session` for bundles that the command wrote itself."""
        return {"operators": "any" if self.any_operator else "known"}

    def check(self, folder: Path, manifest: Manifest) -> str | None:
        """The bundle's hash, None if any bundle is expected. Raises BundleError for an unexpected one."""
        if not self.expected:
            return None
        found = bundle_sha256(folder, manifest)
        if found not in self.expected:
            wanted = " or ".join(sorted(self.expected))
            problem = f"another bundle than expected: expected SHA-256 {wanted}, got {found}"
            fix = "get the bundle again, and compare the hash with what its author published"
            raise BundleError("E0211", "bundle", problem, fix)
        return found


_ANY = Trust()
_trust: ContextVar[Trust] = ContextVar("trust", default=_ANY)


def current() -> Trust:
    """The trust of the command that runs; by default any bundle with known operators."""
    return _trust.get()


@contextmanager
def trusting(value: Trust) -> Iterator[None]:
    """Within it bundles are opened with this trust."""
    token = _trust.set(value)
    try:
        yield
    finally:
        _trust.reset(token)


def bundle_sha256(folder: Path, manifest: Manifest) -> str:
    """SHA-256 of the lines "HASH  NAME" of all files, the manifest included, in the order of their names.

    `sha256sum * | sha256sum` prints the same in the bundle's folder, in the C locale. Raises BundleError.
    """
    from .manifest import MANIFEST

    lines = "".join(f"{_file_sha256(folder / name)}  {name}\n" for name in sorted({MANIFEST, *manifest.files}))
    return hashlib.sha256(lines.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        if path.is_symlink() or not path.is_file():
            raise BundleError("E0206", path.name, f"no such regular file in {path.parent}", "copy the bundle again")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise BundleError("E0206", path.name, problem, "copy the bundle again") from None
    return digest.hexdigest()
