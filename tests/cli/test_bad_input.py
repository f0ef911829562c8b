"""What goes wrong ends with one line that says what to do, the documented exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_tools import Result, command, copy_checkpoint, environment, invoke, reseal, spawn
from safetensors.numpy import load_file, save_file

pytest_plugins = ["cli_fixtures"]
TINY = ("--chunks-per-call", 1, "--positions", 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where bundles would be written."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def refuse_export(checkpoint: Path, folder: Path, code: int, *words: str) -> None:
    """Exporting fails so and leaves nothing behind, also beside the output."""
    result = invoke("export", checkpoint, "-o", folder / "x.titans", *TINY, "--json")
    result.check_failure(code, *words)
    assert result.out == ""
    assert list(folder.iterdir()) == []


class TestCheckpoints:
    def test_missing(self, tmp_path: Path, folder: Path) -> None:
        refuse_export(tmp_path / "none", folder, 1, str(tmp_path / "none"))

    def test_no_weights(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        copy = copy_checkpoint(checkpoint, tmp_path / "copy")
        (copy / "model.safetensors").unlink()
        refuse_export(copy, folder, 1, "model.safetensors")

    @pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
    def test_truncated(self, checkpoint: Path, tmp_path: Path, folder: Path, part: float) -> None:
        copy = copy_checkpoint(checkpoint, tmp_path / "copy")
        raw = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(raw[: int(part * len(raw))])
        refuse_export(copy, folder, 1, "model.safetensors", "damaged file")

    def test_wrong_shapes(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        refuse_export(copy_checkpoint(checkpoint, tmp_path / "copy", hidden=24), folder, 1, "shape", "config.json")

    def test_more_layers_than_weights(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        refuse_export(copy_checkpoint(checkpoint, tmp_path / "copy", layers=2), folder, 1, "layers.1.", "config.json")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, checkpoint: Path, tmp_path: Path, folder: Path, value: float) -> None:
        copy = copy_checkpoint(checkpoint, tmp_path / "copy")
        tensors = load_file(copy / "model.safetensors")
        tensors["head.weight"][3, 4] = value
        save_file(tensors, copy / "model.safetensors")
        refuse_export(copy, folder, 1, "head.weight", "NaN or infinity")

    def test_unknown_variant(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        refuse_export(copy_checkpoint(checkpoint, tmp_path / "copy", variant="mad"), folder, 1, "'mad'", "mac, mag")

    def test_unknown_key(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        refuse_export(copy_checkpoint(checkpoint, tmp_path / "copy", widht=3), folder, 1, "'widht'", "remove")

    def test_missing_key(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        refuse_export(copy_checkpoint(checkpoint, tmp_path / "copy", dim=None), folder, 1, "'dim'", "add it")

    @pytest.mark.parametrize(
        ("tokenizer", "words"),
        [
            ('{"model": {"vocab": {"a": 0, "b": 256}}}', ("E0314", "vocabulary of 256", "'b'")),
            ("{", ("E0302", "tokenizer.json")),
        ],
        ids=["of another model", "damaged"],
    )
    def test_tokenizers(
        self, tokenizer: str, words: tuple[str, ...], checkpoint: Path, tmp_path: Path, folder: Path
    ) -> None:
        copy = copy_checkpoint(checkpoint, tmp_path / "copy")
        (copy / "tokenizer.json").write_text(tokenizer)
        refuse_export(copy, folder, 1, *words)

    def test_config_that_is_no_json(self, checkpoint: Path, tmp_path: Path, folder: Path) -> None:
        copy = copy_checkpoint(checkpoint, tmp_path / "copy")
        (copy / "config.json").write_text("{\n")
        refuse_export(copy, folder, 1, "config.json")


COMMANDS: dict[str, tuple[object, ...]] = {
    "run": ("--prompt", "a"),
    "verify": (),
    "inspect": (),
}


def refuse_bundle(name: str, bundle: Path, code: int, *words: str) -> None:
    result = invoke(name, bundle, *COMMANDS[name])
    result.check_failure(code, *words)
    assert result.out == ""


@pytest.mark.parametrize("name", COMMANDS)
class TestBundles:
    def test_missing(self, name: str, tmp_path: Path) -> None:
        refuse_bundle(name, tmp_path / "none.titans", 1, "none.titans")

    @pytest.mark.parametrize("file", ["decode.onnx", "weights.safetensors", "state.safetensors"])
    def test_a_changed_byte(self, name: str, bundle: Path, file: str) -> None:
        raw = bytearray((bundle / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (bundle / file).write_bytes(raw)
        refuse_bundle(name, bundle, 1, file, "hash")

    def test_a_newer_schema(self, name: str, bundle: Path) -> None:
        reseal(bundle, schema_version=7)
        refuse_bundle(name, bundle, 4, "7")

    def test_a_missing_graph(self, name: str, bundle: Path) -> None:
        (bundle / "decode.onnx").unlink()
        refuse_bundle(name, bundle, 1, "decode.onnx")

    def test_a_manifest_that_is_no_json(self, name: str, bundle: Path) -> None:
        (bundle / "manifest.json").write_text("{")
        refuse_bundle(name, bundle, 1, "manifest.json")

    def test_a_file_outside(self, name: str, bundle: Path, tmp_path: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"]["../secret"] = manifest["files"]["decode.onnx"]
        manifest["initial_state"] = {"file": "../secret"}
        (tmp_path / "secret").write_bytes(b"x")
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        refuse_bundle(name, bundle, 1, "../secret")


class TestRunning:
    def test_a_token_out_of_range(self, shared_bundle: Path) -> None:
        rt = pytest.importorskip("titans_runtime", exc_type=ImportError, reason="the runtime is not built")
        stream = rt.Session(shared_bundle).stream()
        for tokens in ([256], [0, -1]):
            with pytest.raises(rt.Error, match=r"\. Fix: .* \(TITANS-E\d{4}\)") as caught:
                stream.feed(tokens)
            assert caught.value.status == 2
        assert stream.position == 0

    def test_a_text_that_is_not_there(self, shared_bundle: Path, tmp_path: Path) -> None:
        invoke("run", shared_bundle, "--text", tmp_path / "none.txt").check_failure(1, "none.txt")

    def test_a_text_that_is_a_folder(self, shared_bundle: Path, tmp_path: Path) -> None:
        invoke("run", shared_bundle, "--text", tmp_path).check_failure(1, str(tmp_path))

    def test_an_empty_prompt(self, shared_bundle: Path) -> None:
        invoke("run", shared_bundle, "--prompt", "").check_failure(2, "prompt")

    @pytest.mark.parametrize("option", [("--device", "cuda:0"), ("--backend", "abacus")])
    def test_what_this_machine_has_not(self, shared_bundle: Path, option: tuple[str, str]) -> None:
        invoke("run", shared_bundle, "--prompt", "a", *option).check_failure(4, option[1].partition(":")[0])

    def test_no_onnxruntime(self, shared_bundle: Path, tmp_path: Path) -> None:
        nowhere = str(tmp_path / "libonnxruntime.so")
        result = spawn("run", shared_bundle, "--prompt", "a", TITANS_ONNXRUNTIME=nowhere)
        result.check_failure(4, nowhere, "pip install onnxruntime")

    def test_no_runtime(self, shared_bundle: Path, tmp_path: Path) -> None:
        result = spawn("run", shared_bundle, "--prompt", "a", TITANS_LIBRARY=str(tmp_path / "libtitans.so"))
        result.check_failure(4, "libtitans.so", "TITANS_LIBRARY")

    def test_a_full_disk_behind_stdout(self, shared_bundle: Path) -> None:
        with open("/dev/full", "wb") as full:
            child = command("run", shared_bundle, "--prompt", "a", "--max-tokens", 9)
            done = subprocess.run(child, stdout=full, stderr=subprocess.PIPE, env=environment())
        Result(done.returncode, "", done.stderr.decode()).check_failure(1, "No space left")


class TestOutputs:
    def test_below_a_file(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        result = invoke("export", tiny_checkpoint, "-o", tmp_path / "file" / "x.titans", *TINY)
        result.check_failure(1, "x.titans")
        assert (tmp_path / "file").read_text() == "mine"

    def test_in_a_folder_that_is_not_there(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        result = invoke("export", tiny_checkpoint, "-o", tmp_path / "none" / "x.titans", *TINY)
        result.check_failure(1, "x.titans", "create the folder")
        assert not (tmp_path / "none").exists()

    def test_an_existing_one(self, tiny_checkpoint: Path, folder: Path) -> None:
        (folder / "x.titans").mkdir()
        (folder / "x.titans" / "mine").write_text("mine")
        invoke("export", tiny_checkpoint, "-o", folder / "x.titans", *TINY).check_failure(1, "--overwrite")
        assert [path.name for path in folder.rglob("*")] == ["x.titans", "mine"]

    def test_no_permission(self, tiny_checkpoint: Path, folder: Path) -> None:
        """Permissions do not hold root back, so a place is taken where nobody may write."""
        target = folder / "x.titans"
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            target = Path("/proc/x.titans")
        try:
            result = invoke("export", tiny_checkpoint, "-o", target, *TINY)
        finally:
            folder.chmod(0o755)
        result.check_failure(1, "x.titans")
        assert list(folder.iterdir()) == []

    def test_a_file_too_large_for_the_disk(self, tiny_checkpoint: Path, folder: Path) -> None:
        """A limit on the size of files stands in for the end of the disk; the weights do not fit."""
        size = (tiny_checkpoint / "model.safetensors").stat().st_size // 2

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead of ending the process
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        child = command("export", tiny_checkpoint, "-o", folder / "x.titans", *TINY)
        done = subprocess.run(child, capture_output=True, env=environment(), preexec_fn=limit, timeout=240)
        Result(done.returncode, "", done.stderr.decode()).check_failure(1, os.strerror(errno.EFBIG))
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("pages", "words"), [(4, "too little space"), (11, "No space left")], ids=["before", "while it writes"]
    )
    def test_a_full_disk(self, tiny_checkpoint: Path, tmp_path: Path, folder: Path, pages: int, words: str) -> None:
        """In a file system of its own, too small for the weights, or just large enough for them alone."""
        mount = f'mount -t tmpfs -o size={4 * pages}k none "{folder}" && touch "{folder}/mine"'
        if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
            pytest.skip("this machine lets nobody mount a small file system")
        script = f'{mount} && {{ "$@"; code=$?; ls -A "{folder}" > "{tmp_path}/left"; exit $code; }}'
        child = command("export", tiny_checkpoint, "-o", folder / "x.titans", *TINY)
        child = ["unshare", "-rm", "sh", "-c", script, "sh", *child]
        done = subprocess.run(child, capture_output=True, env=environment(), timeout=240)
        Result(done.returncode, "", done.stderr.decode()).check_failure(1, words, "free some space")
        assert (tmp_path / "left").read_text().split() == ["mine"]


@pytest.fixture
def exporting(tiny_checkpoint: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """An export over an existing bundle, that has begun to write."""
    old = folder / "x.titans"
    old.mkdir()
    (old / "manifest.json").write_text("old")
    child = subprocess.Popen(
        command("export", tiny_checkpoint, "-o", old, "--overwrite", *TINY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 240
    while len(list(folder.iterdir())) == 1 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.poll() is None
    assert len(list(folder.iterdir())) == 2
    yield child
    child.kill()
    child.wait()


class TestInterruption:
    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_to_stop(self, exporting: subprocess.Popen[str], folder: Path, stop: signal.Signals) -> None:
        exporting.send_signal(stop)
        out, err = exporting.communicate(timeout=120)
        Result(exporting.returncode, out, err).check_failure(1, "[interrupted]")
        assert out == ""
        assert [path.name for path in folder.iterdir()] == ["x.titans"]
        assert (folder / "x.titans" / "manifest.json").read_text() == "old"

    def test_kill(self, exporting: subprocess.Popen[str], folder: Path) -> None:
        exporting.kill()
        exporting.communicate(timeout=120)
        assert exporting.returncode == -signal.SIGKILL
        assert (folder / "x.titans" / "manifest.json").read_text() == "old"
        assert [path.name for path in (folder / "x.titans").iterdir()] == ["manifest.json"]

    def test_of_a_long_text(self, shared_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_bytes(b"again and again " * (1 << 18))
        with subprocess.Popen(
            command("run", shared_bundle, "--text", tmp_path / "long.txt", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as child:
            try:
                while "libtitans" not in Path(f"/proc/{child.pid}/maps").read_text():
                    time.sleep(0.1)
                time.sleep(1)  # it feeds the text
                child.send_signal(signal.SIGINT)
                out, err = child.communicate(timeout=60)
            finally:
                child.kill()
        Result(child.returncode, out, err).check_failure(1, "[interrupted]")
        assert out == ""


def test_logits_that_differ_leave_no_bundle(
    tiny_checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tolerance is small enough for this one."""
    reference = pytest.importorskip("titans_export.reference")
    monkeypatch.setattr(reference, "TOLERANCE", -1.0)
    monkeypatch.setattr(reference, "FLOAT32_SHARE", float("inf"))
    refuse_export(tiny_checkpoint, folder, 3, "PyTorch", "position 0")


NOWHERE = Path("/proc/none")  # a folder in which nobody may write, not even root
WRITERS: dict[str, tuple[object, ...]] = {
    "export": ("export", "INPUT", "-o", NOWHERE / "x.titans"),
    "quantize": ("quantize", "INPUT", "-o", NOWHERE / "x.titans", "--recipe", "int8-weight-only"),
    "guard": ("guard", "INPUT", "--data", "INPUT", "-o", NOWHERE / "x.titans"),
    "bench": ("bench", "INPUT", "--output", NOWHERE / "x.json"),
    "compare": ("compare", "INPUT", "INPUT", "-o", NOWHERE / "x.json"),
    "compare --html": ("compare", "INPUT", "INPUT", "--html", NOWHERE / "x.html"),
    "inspect --numpy": ("inspect", "INPUT.tstate", "--numpy", NOWHERE / "x.npz"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_outputs_are_checked_before_any_work(name: str, tmp_path: Path) -> None:
    """The input does not exist, so a command that reads it first reports the input."""
    (tmp_path / "INPUT.tstate").write_bytes(b"\x89TITANS\n")
    args = [tmp_path / arg if str(arg).startswith("INPUT") else arg for arg in WRITERS[name]]
    invoke(*args).check_failure(1, "[output]", str(NOWHERE))


def test_an_engine_is_not_built_for_nothing(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("titans_export.engines.build")
    monkeypatch.setattr(build, "_find", lambda plan: pytest.fail("the build has begun"))
    args = ("build", shared_bundle, "--target", "cpu", "-o")
    invoke(*args, NOWHERE / "x.titans").check_failure(1, "[output]", str(NOWHERE))
    invoke(*args, shared_bundle / "x.titans").check_failure(1, "inside of the bundle")


def test_an_output_that_holds_the_input_is_not_replaced(tiny_checkpoint: Path, folder: Path) -> None:
    shutil.copytree(tiny_checkpoint, folder / "x.titans" / "checkpoint")
    (folder / "x.titans" / "manifest.json").write_text("old")
    result = invoke("export", folder / "x.titans" / "checkpoint", "-o", folder / "x.titans", "--overwrite", *TINY)
    result.check_failure(1, "lies inside of it")
    assert (folder / "x.titans" / "checkpoint" / "model.safetensors").is_file()
