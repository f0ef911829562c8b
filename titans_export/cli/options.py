"""Options that several commands have, and the sessions they open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import trust
from ..errors import UsageError
from .choices import DEVICE
from .kinds import check_bundle

if TYPE_CHECKING:
    import titans_runtime

# Commands check paths after all options: a wrong option is exit code 2, a wrong path 1.
PATH = click.Path(path_type=Path)

bundle_argument = click.argument("bundle", type=PATH)
encoding_option = click.option(
    "--encoding-errors",
    type=click.Choice(("strict", "replace")),
    default="strict",
    help="Bytes that are not UTF-8, for a tokenizer.json: refuse the text, or read U+FFFD.",
)
restart_option = click.option(
    "--restart-every", type=click.IntRange(0), default=0, metavar="N", help="Reset the memory every N tokens; 0: never."
)
engine_option = click.option(
    "--engine", help="Engine of the bundle to use; none: the plain graphs.  [default: chosen by the device]"
)

config_option = click.option(
    "--config",
    metavar="JSON|NAME",
    help="Constructor arguments, for checkpoints without a configuration: a JSON file, or train_mac.",
)

weights_option = click.option(
    "--weights",
    metavar="NAME",
    help="State dict to read, for checkpoints with several: its name, or ema.  [default: the model's own]",
)

key_option = click.option(
    "--key-file", type=PATH, metavar="FILE", help="Key of an encrypted state: 32 bytes, or 64 hexadecimal digits."
)


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Where and how a bundle runs. Commands that run one extend it by their own options."""

    device: str = "cpu"
    backend: str | None = None
    threads: int = 0
    memory_kernel: str = "auto"
    engine: str | None = None
    guard: str = "off"


def session_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device, --backend, --threads and --memory-kernel, for `SessionOptions`."""
    for option in (
        click.option(
            "--memory-kernel",
            type=click.Choice(("auto", "require", "off")),
            default="auto",
            help="auto: our kernel if installed; require: our kernel or an error; off: standard operators.",
        ),
        click.option("--threads", type=click.IntRange(0), default=0, help="Threads per call; 0: the backend chooses."),
        click.option("--backend", help="Backend to use, such as onnxruntime.  [default: chosen by the device]"),
        click.option("--device", type=DEVICE, default="cpu", help="Where to run: cpu, cuda or cuda:N."),
    ):
        function = option(function)
    return function


def open_session(bundle: Path, options: SessionOptions, batch: str = "exact") -> titans_runtime.Session:
    """Opens the bundle on the device. Needs numpy and the runtime only. batch: "exact" or "fast"."""
    check_bundle(bundle)
    import titans_runtime

    return titans_runtime.Session(
        bundle,
        device=options.device,
        backend=options.backend,
        threads=options.threads,
        memory_kernel=options.memory_kernel,
        engine=options.engine,
        guard=options.guard,
        batch=batch,
        **trust.current().session_options(bundle),
    )


def check_finite(command: str, option: str, value: float | None) -> None:
    """Raises UsageError for an option whose value is NaN or infinite."""
    if value is not None and not math.isfinite(value):
        raise UsageError("E0104", command, f"{option} is {value}", "give a finite number, such as 1e-4")
