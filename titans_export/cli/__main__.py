"""The program: `titans-export`, or `python -m titans_export.cli`."""

from __future__ import annotations

import os
import sys

from . import main
from .command import Interrupted


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    try:
        main()
    except Interrupted as end:
        # Python remembers an interrupt that passed through code compiled at run time, such as torch.fx code, and
        # would end by SIGINT even after it was handled.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    run()
