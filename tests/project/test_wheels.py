"""Wheels and source distributions: their files, their dependencies, and a stream in an environment without torch."""

from __future__ import annotations

import email
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from importlib.metadata import version
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import numpy.typing as npt
import pytest
import torch
from tolerances import TOLERANCES

from titans_export.checkpoints.titans import load

pytest.importorskip("titans_runtime", reason="the runtime is not built: make setup", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
# That of Ubuntu 22.04, so of JetPack 6.
NEWEST_GLIBC = 35
# Of an installed runtime with numpy, and without ONNX Runtime.
LARGEST_MB = 80
DEPS = ROOT / ".deps"
# Variables that point at a build of the checkout would hide what a package lacks.
HIDING = ("TITANS_LIBRARY", "TITANS_ONNXRUNTIME", "PYTHONPATH")

pytest_plugins = ["cli_fixtures"]


def make(folder: Path, what: str) -> Path:
    if shutil.which("auditwheel", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("no auditwheel beside this Python: make setup")
    # One build folder, and tests run in several processes.
    with (ROOT / "build" / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([str(ROOT / "tools" / "wheels"), "-o", str(folder), what], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
        return email.message_from_bytes(archive.read(name))


def check_runtime_wheel(wheel: Path, machine: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        notices = archive.read("titans_runtime/NOTICES").decode()
    assert all(project in notices for project in ("nlohmann", "xxHash", "libhwy")), "no licences of compiled-in code"
    matched = re.fullmatch(rf"titans_runtime-[\d.]+-py3-none-manylinux_2_(\d+)_{machine}\.whl", wheel.name)
    assert matched, wheel.name
    assert int(matched[1]) <= NEWEST_GLIBC
    told = metadata(wheel)
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Summary"]
    assert "Operating System :: POSIX :: Linux" in told.get_all("Classifier", [])
    assert sorted(told.get_all("Requires-Dist") or []) == [
        "numpy>=1.24",
        'onnxruntime>=1.21; python_version < "3.11" and extra == "onnxruntime"',
        'onnxruntime>=1.28; python_version >= "3.11" and extra == "onnxruntime"',
    ]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    libraries = sorted((folder / "titans_runtime").glob("*.so*"))
    names = {"libtitans.so", "libtitans_backend_onnxruntime.so", "libtitans_onnxruntime_ops.so"}
    assert names <= {library.name for library in libraries}
    for library in libraries:
        read = subprocess.run(
            ["readelf", "-W", "-d", "-S", "-h", str(library)], capture_output=True, text=True, check=True
        ).stdout
        assert {"x86_64": "X86-64", "aarch64": "AArch64"}[machine] in read
        assert ".symtab" not in read, f"{library.name} is not stripped"
        assert "RPATH" not in read
        assert "RUNPATH" not in read
        needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", read))
        assert needed <= {"libc", "libm", "libstdc++", "libgcc_s", "ld-linux-x86-64", "ld-linux-aarch64"}


def check_logits(logits: npt.NDArray[Any], checkpoint: Path, tokens: npt.NDArray[np.int64]) -> None:
    """Those after the last token, against PyTorch."""
    model = load(checkpoint).model
    expected, _ = model.feed(torch.from_numpy(tokens)[None], model.initial_state(1), 0)
    assert np.abs(logits - expected[0, -1].detach().numpy()).max() < TOLERANCES["cpu", "float32"]


@pytest.mark.long
def test_the_runtime_in_a_bare_environment(checkpoint: Path, shared_bundle: Path, tmp_path: Path) -> None:
    wheel = make(tmp_path / "dist", "native")
    check_runtime_wheel(wheel, os.uname().machine, tmp_path / "unpacked")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    wanted = [wheel, *(f"{name}=={version(name)}" for name in ("numpy", "onnxruntime"))]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)

    tokens = np.random.default_rng(9).integers(0, load(checkpoint).model.output.size, 60)
    code = f"""
import importlib.util, json, pathlib
import titans_runtime as rt
with rt.Session({str(shared_bundle)!r}, threads=1, memory_kernel="require") as session:
    logits = session.stream().feed({tokens.tolist()}, outputs="last").reshape(-1).tolist()
there = [name for name in ("torch", "onnx") if importlib.util.find_spec(name)]
site = pathlib.Path(rt.__file__).parents[1]
sizes = {{name: sum(file.stat().st_size for file in (site / name).rglob("*") if file.is_file())
         for name in ("titans_runtime", "numpy", "numpy.libs", "onnxruntime")}}
print(json.dumps([logits, there, sizes]))
"""
    env = {name: value for name, value in os.environ.items() if name not in HIDING}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    logits, there, sizes = json.loads(done.stdout)
    assert not there
    check_logits(np.array(logits), checkpoint, tokens)
    megabytes = {name: round(size / 1e6, 1) for name, size in sizes.items()}
    print(f"MB installed: {megabytes}")
    assert sum(megabytes[name] for name in ("titans_runtime", "numpy", "numpy.libs")) < LARGEST_MB


def test_the_runtime_for_aarch64(checkpoint: Path, shared_bundle: Path, tmp_path: Path) -> None:
    """That of `make wheels`, which compiles it; emulated, under a program in C."""
    found = sorted((ROOT / "dist").glob("titans_runtime-*_aarch64.whl"))
    if not found:
        pytest.skip("no wheel for aarch64 in dist: make wheels")
    check_runtime_wheel(found[-1], "aarch64", tmp_path)
    program = emulation.BUILD / "tests" / "cpp" / "titans_stream_exchange"
    if (why := emulation.why_not()) or emulation.onnxruntime() is None or not program.exists():
        pytest.skip(f"looked at, but not run: {why or 'make kernels makes what runs it'}")
    folder = tmp_path / "titans_runtime"
    (folder / "libtitans.so.0.1").symlink_to("libtitans.so")
    tokens = np.random.default_rng(10).integers(0, load(checkpoint).model.output.size, 20)
    done = subprocess.run(
        [*emulation.EMULATOR, "-E", f"LD_LIBRARY_PATH={folder}", program, shared_bundle, "-", "-", *map(str, tokens)],
        env={**os.environ, "TITANS_ONNXRUNTIME": str(emulation.onnxruntime())}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_logits(np.array(done.stdout.split(), np.float32), checkpoint, tokens)


def test_the_export_is_pure_python(tmp_path: Path) -> None:
    wheel = make(tmp_path, "export")
    assert re.fullmatch(r"titans_export-[\d.]+-py3-none-any\.whl", wheel.name)
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    for folder in (ROOT / "titans_export", ROOT / "calibration" / "titans_calibration"):
        assert python_files(folder) <= names
        assert f"{folder.name}/py.typed" in names


def make_sdist(project: Path, folder: Path) -> Path:
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist] = folder.glob("*.tar.gz")
    return sdist


def install(sdist: Path, folder: Path, *settings: str) -> None:
    """The package alone, into a folder of its own, built by the tools that are here."""
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *(f"--config-settings={one}" for one in settings), sdist],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def run_installed(folder: Path, code: str) -> Any:
    """What `code` prints as JSON. Without -S the checkout that is installed as editable would be found first."""
    packages = sysconfig.get_paths()["purelib"]
    script = f"import json, sys; sys.path[:0] = [{str(folder)!r}, {packages!r}]\n{code}"
    env = {name: value for name, value in os.environ.items() if name not in HIDING}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=folder, env=env
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def python_files(folder: Path) -> set[str]:
    return {
        f"{folder.name}/{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in {".py", ".toml", ".json", ".typed", ".html"}
    }


def test_the_sdist_of_titans_export_installs(tmp_path: Path) -> None:
    install(make_sdist(ROOT, tmp_path), tmp_path / "site")
    installed = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*")}
    packages = (ROOT / "titans_export", ROOT / "calibration" / "titans_calibration")
    for folder in packages:
        assert python_files(folder) <= installed
        assert f"{folder.name}/py.typed" in installed
    code = """
from importlib.metadata import distribution
from titans_calibration import recipe
from titans_export.cli import __main__
found = distribution("titans-export")
[script] = found.entry_points
assert script.load() is __main__.run
print(json.dumps([recipe.__file__, recipe.recipe_names(), script.name, found.metadata["License-Expression"]]))
"""
    file, names, script, licence = run_installed(tmp_path / "site", code)
    assert Path(file).is_relative_to(tmp_path)
    assert names == sorted(path.stem for path in (packages[1] / "recipes").glob("*.toml"))
    assert (script, licence) == ("titans-export", "Apache-2.0")


def test_the_sdist_of_titans_runtime_has_its_sources(tmp_path: Path) -> None:
    sdist = make_sdist(ROOT / "runtime" / "python", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]
    assert {"titans_runtime/py.typed", "LICENSE", "README.md", "cpp/tools/fetch_deps"} <= names
    # CMake fails if a file of the library is missing.
    source, build = tmp_path / sdist.name.removesuffix(".tar.gz") / "cpp", tmp_path / "build"
    done = subprocess.run(
        ["cmake", "-S", source, "-B", build, f"-DTITANS_DEPS={DEPS}", "-DTITANS_REQUIRE_ONNXRUNTIME=ON",
         "-DTITANS_REQUIRE_KERNELS=ON"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_sdist_of_titans_runtime_installs(tmp_path: Path) -> None:
    """Compiles the runtime: about a minute on two idle cores."""
    sdist = make_sdist(ROOT / "runtime" / "python", tmp_path)
    install(sdist, tmp_path / "site", f"cmake.define.TITANS_DEPS={DEPS}")
    names = {path.name for path in (tmp_path / "site" / "titans_runtime").iterdir()}
    assert {"libtitans.so", "libtitans_backend_onnxruntime.so", "libtitans_onnxruntime_ops.so", "py.typed"} <= names
    code = "import titans_runtime as rt; print(json.dumps([rt.__file__, rt.__version__]))"
    file, found = run_installed(tmp_path / "site", code)
    assert Path(file).is_relative_to(tmp_path)
    assert sdist.name == f"titans_runtime-{found}.tar.gz"


def test_a_checkout_without_symbolic_links_is_whole() -> None:
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]
    assert (ROOT / "runtime" / "python" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
