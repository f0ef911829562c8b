"""Seconds and peak memory of each command for models of 20 M to 1.3 B parameters.

    python -m benchmarks.sizes                            20 M and 170 M, in a temporary folder
    python -m benchmarks.sizes --size 760M --folder DISK -o RESULT.json
    python -m benchmarks.sizes --size 760M --folder DISK --keep --step export      its files stay in DISK/760M
    python -m benchmarks.sizes --law RESULT.json          the growth law of a result

The models are MAC models of the project's own format with random weights, about the paper's shapes: a memory in every
layer, 32,000 tokens. Each command runs in a process of its own. Its peak memory is the largest resident set, mapped
files included. The growth law is a line through all sizes: seconds and bytes per byte of float32 weights, and what is
left at no weights. -o adds to an existing result, so that sizes and steps can be measured one by one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click


class Shape(NamedTuple):
    """A MAC model. memory_heads: each of width 64, like those of attention."""

    dim: int
    layers: int
    hidden: int
    memory_heads: int
    vocabulary: int


SHAPES = {
    "20M": Shape(256, 12, 512, 4, 8_000),
    "170M": Shape(768, 12, 2_048, 6, 32_000),
    "350M": Shape(1_024, 24, 1_024, 8, 32_000),
    "760M": Shape(1_536, 24, 2_048, 12, 32_000),
    "1.3B": Shape(2_048, 24, 2_816, 16, 32_000),
}
TOKENS, DECODED = 512, 16  # that a session reads in one feed, and then one at a time
CALIBRATION = 4_096  # tokens of the int4 recipe
# Bytes of memory that each step may take, per byte of float32 weights and in addition. A session that opens a quantised
# bundle counts that bundle's own weights.
REACH = {
    "export": (2.5, 1e9),
    **dict.fromkeys(("quantize int8", "quantize int4", "build", "build int8", "build int4", "verify"), (2.0, 1e9)),
    **dict.fromkeys(("open", "open int8", "open int8 engine", "open int4", "open int4 engine"), (1.1, 3e8)),
}
_MAKE = """
import json, sys, torch
from pathlib import Path
from titans_export.checkpoints.titans import save
from titans_export.model import MemoryConfig, ModelConfig, Titans
dim, layers, hidden, heads, vocabulary = json.loads(sys.argv[1])
memory = MemoryConfig(heads, 64, 64)
attention = {"attention_heads": dim // 64, "window": 256, "persistent": 8}
config = ModelConfig("mac", vocabulary, dim, layers, hidden, memory, **attention)
torch.manual_seed(0)
save(Titans(config), Path(sys.argv[2]))
"""
_OPEN = "import sys, titans_runtime as rt; session = rt.Session(sys.argv[1])"
_STREAM = f"""{_OPEN}
import numpy as np
stream = session.stream()
stream.feed(np.arange({TOKENS}) % session.vocab_size, outputs="last")
for token in range({DECODED}): stream.step(token)
"""
_DATA = "import sys, numpy as np; np.savez(sys.argv[1], np.random.default_rng(0).integers(0, *map(int, sys.argv[2:])))"


def run(arguments: list[str], name: str) -> dict[str, float]:
    """Runs Python with these arguments. Returns wall seconds, processor seconds, and the peak memory in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise click.ClickException(f"{name} ended with code {process.returncode}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def commands(folder: Path) -> dict[str, list[str]]:
    """Arguments of Python by the name of each step, in order. A step's output is its `-o`."""
    bundle, int8, int4, built = (str(folder / f"{name}.titans") for name in ("model", "int8", "int4", "built"))
    engines = {name: str(folder / f"{name} engine.titans") for name in ("int8", "int4")}
    program = ["-m", "titans_export.cli"]
    quantize = [*program, "quantize", bundle, "--recipe"]
    data = ["--data", str(folder / "tokens.npz"), "--tokens", str(CALIBRATION)]
    return {
        "export": [*program, "export", str(folder / "checkpoint"), "-o", bundle],
        "open": ["-c", _OPEN, bundle],
        "stream": ["-c", _STREAM, bundle],
        "verify": [*program, "verify", bundle],
        "build": [*program, "build", bundle, "--target", "cpu", "-o", built],
        "quantize int8": [*quantize, "int8-weight-only", "-o", int8],
        "open int8": ["-c", _OPEN, int8],
        "stream int8": ["-c", _STREAM, int8],
        "build int8": [*program, "build", int8, "--target", "cpu", "-o", engines["int8"]],
        "open int8 engine": ["-c", _OPEN, engines["int8"]],
        "stream int8 engine": ["-c", _STREAM, engines["int8"]],
        "quantize int4": [*quantize, "int4-weight-only", *data, "-o", int4],
        "open int4": ["-c", _OPEN, int4],
        "stream int4": ["-c", _STREAM, int4],
        "build int4": [*program, "build", int4, "--target", "cpu", "-o", engines["int4"]],
        "open int4 engine": ["-c", _OPEN, engines["int4"]],
        "stream int4 engine": ["-c", _STREAM, engines["int4"]],
    }


def _make(size: str, folder: Path) -> int:
    """Makes the checkpoint and the calibration tokens unless they exist; returns the bytes of the weights."""
    checkpoint, data = folder / "checkpoint", folder / "tokens.npz"
    if not (checkpoint / "model.safetensors").exists():
        run(["-c", _MAKE, json.dumps(SHAPES[size]), str(checkpoint)], "making the checkpoint")
    run(["-c", _DATA, str(data), str(SHAPES[size].vocabulary), str(CALIBRATION)], "making calibration tokens")
    return (checkpoint / "model.safetensors").stat().st_size


def measure(size: str, folder: Path, steps: tuple[str, ...]) -> dict[str, Any]:
    """The steps for one size. A step whose input is missing fails; the others still count."""
    weights = _make(size, folder)
    click.echo(f"{size}: {weights / 1e9:.3f} GB of weights")
    found: dict[str, Any] = {}
    for name, arguments in commands(folder).items():
        if name not in steps:
            continue
        if "-o" in arguments:
            shutil.rmtree(arguments[arguments.index("-o") + 1], ignore_errors=True)
        load = os.getloadavg()[0]
        try:
            found[name] = {**run(arguments, f"{size}: {name}"), "load_before": load, "load_after": os.getloadavg()[0]}
        except click.ClickException as error:
            click.echo(f"  {error.message}", err=True)
            continue
        own = _weights_of(name, folder, weights)
        found[name]["weights_bytes"] = own
        peak, (times, added) = found[name]["peak_bytes"], REACH.get(name, (0.0, 0.0))
        click.echo(
            f"  {name:14} {found[name]['seconds']:7.1f} s ({found[name]['processor_seconds']:.1f} of processors) "
            f"{peak / 1e9:6.2f} GB" + (f" of {(times * own + added) / 1e9:.2f}" if times else "")
        )
    return {"weights_bytes": weights, "shape": SHAPES[size]._asdict(), "steps": found}


def _weights_of(step: str, folder: Path, weights: int) -> int:
    """Bytes of the weights that a step's reach is measured by."""
    kind, _, form = step.partition(" ")
    own = folder / f"{form.partition(' ')[0]}.titans" / "weights.safetensors"
    return own.stat().st_size if form and kind != "quantize" else weights


def law(sizes: dict[str, Any]) -> dict[str, Any]:
    """Slope and intercept of the least-squares line of each step over the bytes of weights, for two sizes or more."""
    import numpy as np

    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for size in sizes.values() for name in size["steps"]):
        points = [(size["weights_bytes"], size["steps"][name]) for size in sizes.values() if name in size["steps"]]
        if len(points) < 2:
            continue
        x = [weights for weights, _ in points]
        peak = np.polyfit(x, [step["peak_bytes"] for _, step in points], 1)
        cost = np.polyfit(x, [step["processor_seconds"] for _, step in points], 1)
        result[name] = {
            "sizes": len(points),
            "peak_bytes_per_byte": float(peak[0]),
            "peak_bytes_at_zero": float(peak[1]),
            "processor_seconds_per_gb": float(cost[0]) * 1e9,
            "processor_seconds_at_zero": float(cost[1]),
        }
    return result


def show(sizes: dict[str, Any]) -> None:
    """Prints the growth law."""
    for name, line in law(sizes).items():
        click.echo(
            f"{name:12} {line['peak_bytes_per_byte']:.2f} x weights + {line['peak_bytes_at_zero'] / 1e9:.2f} GB; "
            f"{line['processor_seconds_per_gb']:.0f} s a GB + {line['processor_seconds_at_zero']:.0f} s"
        )


@click.command(help=__doc__)
@click.option("--size", "sizes", multiple=True, type=click.Choice([*SHAPES]), help="By default 20M and 170M.")
@click.option("--step", "steps", multiple=True, type=click.Choice([*commands(Path())]), help="By default all.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where files go.")
@click.option("--keep", is_flag=True, help="Keep the files in FOLDER/SIZE, and use those of an earlier run.")
@click.option("--law", "of", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Only print this.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False))
def main(
    sizes: tuple[str, ...],
    steps: tuple[str, ...],
    folder: Path | None,
    keep: bool,
    of: Path | None,
    output: Path | None,
) -> None:
    if keep and folder is None:
        raise click.UsageError("--keep needs --folder")
    if of is not None:
        show(json.loads(of.read_text(encoding="utf-8"))["sizes"])
        return
    known = json.loads(output.read_text(encoding="utf-8"))["sizes"] if output is not None and output.exists() else {}
    for size in sizes or ("20M", "170M"):
        place = folder / size if keep and folder is not None else Path(tempfile.mkdtemp(dir=folder))
        place.mkdir(exist_ok=True)
        try:
            new = measure(size, place, steps or tuple(commands(place)))
        finally:
            if not keep:
                shutil.rmtree(place)
        new["steps"] = {**known.get(size, {}).get("steps", {}), **new["steps"]}
        known[size] = new
        if output is not None:
            _write(output, known)
    show(known)


def _write(output: Path, sizes: dict[str, Any]) -> None:
    from benchmarks import report
    from titans_export.bench.machine import others_busy

    result = {
        "benchmark": "sizes",
        "what": "seconds and peak memory of each command over the size of a MAC model, one process each",
        **report.provenance(),
        "others_busy": others_busy(),
        "niceness": os.nice(0),
        "calibration_tokens": CALIBRATION,
        "reach": REACH,
        "sizes": {name: sizes[name] for name in SHAPES if name in sizes},
        "law": law(sizes),
    }
    report.write(output, result)


if __name__ == "__main__":
    main()
