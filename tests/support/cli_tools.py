"""The command line as tests call it, and what they do to models and bundles."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from click.testing import CliRunner

from titans_export.checkpoints import titans
from titans_export.cli import main
from titans_export.model import ModelConfig, Titans

FAILURE = re.compile(r"titans-export: \[[^\]]+\] .*[^.]\. Fix: .*[^.] \(TITANS-E\d{4}\)")
TEXT = ("The quick brown fox jumps over the lazy dog, again and again. " * 15).encode()


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Stdout, which must be one JSON object and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def check_failure(self, code: int, *words: str) -> None:
        """One line with the problem, the fix and the code; the exit code; no traceback."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("titans-export: [")]
        assert len(lines) == 1, self.err
        assert lines[0] == self.err.splitlines()[-1]
        assert FAILURE.fullmatch(lines[0]), lines[0]
        for word in words:
            assert word in lines[0], lines[0]


def invoke(*args: object, stdin: bytes = b"") -> Result:
    """Runs a command in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    return Result(result.exit_code, result.stdout, result.stderr)


def environment(**more: str) -> dict[str, str]:
    """The environment for a child that imports what this process imports."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def command(*args: object) -> list[str]:
    """The command line for a process of its own."""
    return [sys.executable, "-m", "titans_export.cli", *map(str, args)]


def spawn(*args: object, stdin: bytes = b"", **env: str) -> Result:
    """Runs a command in a process of its own."""
    done = subprocess.run(command(*args), input=stdin, capture_output=True, env=environment(**env), timeout=120)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def copy_checkpoint(checkpoint: Path, to: Path, **config: Any) -> Path:
    """A copy with keys of config.json changed, or removed where the value is None."""
    shutil.copytree(checkpoint, to)
    values = json.loads((to / "config.json").read_text())
    values.update(config)
    values = {key: value for key, value in values.items() if value is not None or key not in config}
    (to / "config.json").write_text(json.dumps(values))
    return to


def reseal(bundle: Path, **changes: Any) -> None:
    """Changes keys of the manifest and makes sizes and hashes right for the files as they are."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest.update(changes)
    extra = {"tokenizer.json"} if (bundle / "tokenizer.json").exists() else set()
    for name in extra.union(manifest["files"]):
        raw = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def save_model(folder: Path, **config: Any) -> Path:
    """A random model as a checkpoint."""
    torch.manual_seed(0)
    model = Titans(ModelConfig(vocab_size=256, dim=16, layers=1, hidden=16, **config))
    titans.save(model, folder)
    return folder
