"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import titans_runtime

# Whether a path is there is the readers' question: they answer it with what to do, and exit code 1.
PATH = click.Path(path_type=Path)

bundle_argument = click.argument("bundle", type=PATH)
engine_option = click.option(
    "--engine", help="Engine of the bundle to insist on; none: the plain graphs.  [default: chosen by the device]"
)

config_option = click.option(
    "--config",
    metavar="JSON|NAME",
    help="Constructor's arguments, for formats whose checkpoints have none: a JSON file, or train_mac.",
)

key_option = click.option(
    "--key-file", type=PATH, metavar="FILE", help="Key of an encrypted state: 32 bytes, or 64 hexadecimal digits."
)


def session_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device, --backend, --threads and --memory-kernel, for `open_session`."""
    for option in (
        click.option(
            "--memory-kernel",
            type=click.Choice(("auto", "require", "off")),
            default="auto",
            help="Our kernel where it is installed, always, or the graphs' own standard operators.",
        ),
        click.option("--threads", type=click.IntRange(0), default=0, help="Threads in a call; 0: the backend chooses."),
        click.option("--backend", help="Backend to insist on, such as onnxruntime.  [default: chosen by the device]"),
        click.option("--device", default="cpu", help="Where to run: cpu, cuda or cuda:N."),
    ):
        function = option(function)
    return function


def open_session(
    bundle: Path, device: str, backend: str | None, threads: int, memory_kernel: str, engine: str | None = None
) -> titans_runtime.Session:
    """The bundle on the device. Needs numpy and the runtime, nothing else."""
    import titans_runtime

    return titans_runtime.Session(
        bundle, device=device, backend=backend, threads=threads, memory_kernel=memory_kernel, engine=engine
    )
