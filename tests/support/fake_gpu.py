"""A machine with a GPU, for tests of what runs there: programs of its names, which do what the CPU can.

Run as a program it stands for `neural_memory_run_cuda`, and has the CPU kernel compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU_PROGRAM = ROOT / "build" / "runtime" / "bin" / "neural_memory_run"
SMI = "NVIDIA H100 80GB HBM3, 9.0, 580.82.07, 81559, 700.00, 1980, 2619, Disabled"
# Notes what it is asked for, and "builds" a program that runs this file.
CMAKE = """
import pathlib, sys
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
program = pathlib.Path({program!r})
program.parent.mkdir(parents=True, exist_ok=True)
program.write_text("#!" + sys.executable + "\\nimport runpy\\nrunpy.run_path('{fake}', run_name='__main__')\\n")
program.chmod(0o755)
"""


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_machine(folder: Path, program: Path) -> None:
    """nvidia-smi, nvcc, cmake and compute-sanitizer in `folder`; "building" puts the stand-in where `program` is."""
    python = f"#!{sys.executable}\n"
    _script(folder / "nvidia-smi", f"#!/bin/sh\necho '{SMI}'\n")
    _script(folder / "nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    _script(folder / "cmake", python + CMAKE.format(log=str(folder / "cmake.log"), program=str(program), fake=__file__))
    _script(
        folder / "compute-sanitizer",
        python + "import os, subprocess, sys\n"
        "tool, rest = sys.argv[2], sys.argv[5:]\n"
        "subprocess.run(rest, check=True, stdout=subprocess.DEVNULL)\n"
        "found = os.environ.get('FAKE_SANITIZER') == tool\n"
        "print(f'========= {tool.upper()} SUMMARY: {int(found)} errors')\n"
        "sys.exit(86 if found else 0)\n",
    )


def main() -> None:
    words = sys.argv[1:]
    device = {"sm": 90, "multiprocessors": 132, "shared_bytes": 232448}
    if words == ["--device"]:
        print(json.dumps(device))
        return
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    words = [word for word in words if word != "--graph"]
    with tempfile.TemporaryDirectory() as folder, safe_open(words[0], "pt") as source:
        tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118  # it is no dictionary
        values = tensors["0.q"].dtype
        widened = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
        case = Path(folder, "case.safetensors")
        save_file(widened, case, source.metadata())
        command = [str(CPU_PROGRAM), str(case), *words[1:], "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert values in (torch.float32, torch.bfloat16, torch.float16)
    if os.environ.get("FAKE_WRONG"):
        out = Path(words[1])
        out.write_bytes(bytes(out.stat().st_size))
    printed = json.loads(done.stdout) if done.stdout.strip() else {}
    report = {"device": device, "placement": "blocks 1"}
    print(json.dumps(report | ({"ns": [sum(calls) for calls in printed["ns"]]} if printed else {})))


if __name__ == "__main__":
    main()
