"""What goes wrong is said in one line, with what to do, and changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import write_manifest

import titans_runtime as rt

FAILED, INVALID_ARGUMENT, UNSUPPORTED = 1, 2, 4
FORM = re.compile(r"\[[^\]]+\] .+\. Fix: .+ \(TITANS-E\d{4}\)")


def check(error: rt.Error, status: int, *words: str) -> None:
    message = str(error)
    assert FORM.fullmatch(message), message  # `.` matches no line break
    assert error.status == status, message
    assert message.endswith(f"({error.code})")
    for word in words:
        assert word in message


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.titans"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and keeps its hashes right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)


def refuse(folder: Path, status: int, *words: str, **options: Any) -> None:
    with pytest.raises(rt.Error) as caught:
        rt.Session(folder, **options)
    check(caught.value, status, *words)


def test_no_bundle(tmp_path: Path) -> None:
    refuse(tmp_path / "none.titans", FAILED, "none.titans")


def test_no_manifest(tmp_path: Path) -> None:
    refuse(tmp_path, FAILED, "manifest.json")


def test_a_newer_schema(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(schema_version=3))
    refuse(copy, UNSUPPORTED, "schema_version", "3")


@pytest.mark.parametrize("name", ["decode.onnx", "weights.safetensors", "state.safetensors"])
class TestDamage:
    def test_missing(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        refuse(copy, FAILED, name)

    def test_one_byte(self, copy: Path, name: str) -> None:
        raw = bytearray((copy / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (copy / name).write_bytes(raw)
        refuse(copy, FAILED, name, "hash")

    def test_truncated(self, copy: Path, name: str) -> None:
        raw = (copy / name).read_bytes()
        (copy / name).write_bytes(raw[:-1])
        refuse(copy, FAILED, name, f"{len(raw)} bytes")

    def test_a_link(self, copy: Path, name: str, bundle: Path) -> None:
        (copy / name).unlink()
        (copy / name).symlink_to(bundle / name)
        refuse(copy, FAILED, name, "link")


def test_no_graph_for_one_token(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["graphs"].pop())
    refuse(copy, FAILED, "tokens = 1")


def test_a_graph_that_is_no_onnx(copy: Path) -> None:
    (copy / "chunk.onnx").write_bytes(b"not\na\ngraph")
    edit(copy, lambda manifest: None)
    refuse(copy, FAILED, "chunk.onnx")


def test_a_graph_unlike_the_manifest(copy: Path) -> None:
    shutil.copy(copy / "prefill.onnx", copy / "chunk.onnx")
    edit(copy, lambda manifest: None)
    refuse(copy, FAILED, "chunk.onnx", "tokens", "[1, 4]", "[1, 8]")


def test_a_graph_without_a_promised_input(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["controls"].update(learn="teach"))
    refuse(copy, FAILED, "teach")


@pytest.mark.parametrize("device", ["cuda:0", "npu", ""])
def test_an_unknown_device(bundle: Path, device: str) -> None:
    refuse(bundle, UNSUPPORTED, "cpu", device=device)
    refuse(bundle, UNSUPPORTED, "cpu", device=device, backend="onnxruntime")


def test_an_unknown_backend(bundle: Path) -> None:
    refuse(bundle, UNSUPPORTED, "abacus", "onnxruntime", backend="abacus")


def test_no_backend_library_of_ours(bundle: Path, tmp_path: Path) -> None:
    refuse(bundle, UNSUPPORTED, "libtitans_backend_onnxruntime.so", plugin_dir=tmp_path)


def test_no_onnxruntime(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(bundle, UNSUPPORTED, "pip install onnxruntime", backend_library="/no/libonnxruntime.so")
    monkeypatch.setenv("TITANS_ONNXRUNTIME", "/no/other.so")
    refuse(bundle, UNSUPPORTED, "pip install onnxruntime", "/no/other.so")


def test_a_library_that_is_no_onnxruntime(bundle: Path) -> None:
    refuse(bundle, UNSUPPORTED, "OrtGetApiBase", backend_library="libm.so.6")


def test_negative_threads(bundle: Path) -> None:
    refuse(bundle, INVALID_ARGUMENT, "threads", threads=-1)


@pytest.mark.parametrize("tokens", [[0, 16], [-1], [2**31 - 1], np.array([2**40]), np.array([2**63], np.uint64)])
@pytest.mark.parametrize("verb", ["feed", "score"])
def test_a_token_out_of_range_changes_nothing(session: rt.Session, verb: str, tokens: Any) -> None:
    stream = session.stream()
    stream.feed([1, 2, 3], outputs="none")
    twin = stream.fork()
    with pytest.raises(rt.Error) as caught:
        getattr(stream, verb)([*[1] * 20, *tokens])
    check(caught.value, INVALID_ARGUMENT, "token")
    assert stream.position == 3
    np.testing.assert_array_equal(stream.feed([4, 5]), twin.feed([4, 5]))


@pytest.mark.parametrize("tokens", [[1.0], np.ones(3), "text", [[1, 2]], 3, [None], [True, False]], ids=repr)
def test_tokens_that_are_no_integers(session: rt.Session, tokens: Any) -> None:
    with pytest.raises(rt.Error) as caught:
        session.stream().feed(tokens)
    check(caught.value, INVALID_ARGUMENT)


def test_step_with_a_wrong_token(session: rt.Session) -> None:
    for token in (16, -1, 2**40, 1.5, "a"):
        with pytest.raises(rt.Error) as caught:
            session.stream().step(token)  # type: ignore[arg-type]
        check(caught.value, INVALID_ARGUMENT)


def test_last_logits_of_a_fresh_stream(session: rt.Session) -> None:
    with pytest.raises(rt.Error) as caught:
        session.stream().feed([], outputs="last")
    check(caught.value, INVALID_ARGUMENT)


def test_an_unknown_choice_of_logits(session: rt.Session) -> None:
    with pytest.raises(rt.Error) as caught:
        session.stream().feed([1], outputs="some")  # type: ignore[arg-type]
    check(caught.value, INVALID_ARGUMENT, "some")


def test_a_closed_stream(session: rt.Session) -> None:
    with session.stream() as stream:
        pass
    stream.close()
    for use in (lambda: stream.feed([1]), lambda: stream.position, stream.fork, stream.memory):
        with pytest.raises(rt.Error) as caught:
            use()
        check(caught.value, INVALID_ARGUMENT, "closed")


def test_weights_of_another_type_than_the_graph_declares(copy: Path) -> None:
    """ONNX Runtime would read one as the other."""
    weights = load_file(copy / "weights.safetensors")
    for name, value in weights.items():
        if value.dtype == np.float32:
            save_file({**weights, name: value.astype(np.float64)}, copy / "weights.safetensors")
            edit(copy, lambda manifest: None)
            refuse(copy, FAILED, name, "as in", ".onnx")
    assert weights


def test_weights_of_another_shape_than_the_graph_declares(copy: Path) -> None:
    weights = load_file(copy / "weights.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name].reshape(-1)}, copy / "weights.safetensors")
    edit(copy, lambda manifest: None)
    refuse(copy, FAILED, name, "as in", ".onnx")


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2**32 + 1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"max_tokens": 2**63},
        {"max_tokens": -1},
        {"seed": 2**64},
        {"seed": -1},
        {"stop": [True, 3]},
    ],
    ids=str,
)
def test_numbers_that_ctypes_would_cut(bundle: Path, options: dict[str, Any]) -> None:
    with rt.Session(bundle) as session:
        stream = session.stream()
        stream.feed([1])
        with pytest.raises(rt.Error) as caught:
            stream.generate(**options)
        check(caught.value, INVALID_ARGUMENT)
        for tokens in ([[1, 2], [3]], [True, 5], [2**70]):
            with pytest.raises(rt.Error) as caught:
                stream.feed(tokens)  # type: ignore[arg-type]
            check(caught.value, INVALID_ARGUMENT)
        assert stream.position == 1


def test_threads_and_texts_that_ctypes_would_cut(bundle: Path) -> None:
    refuse(bundle, INVALID_ARGUMENT, "threads", threads=2**32 + 1)
    refuse(bundle, INVALID_ARGUMENT, "NUL", device="cpu\0cuda")


def test_a_generation_does_not_outlive_what_its_stream_read(bundle: Path) -> None:
    with rt.Session(bundle) as session:
        stream = session.stream()
        stream.feed([1, 2, 3])
        generation = stream.generate()
        next(generation)
        stream.reset()
        with pytest.raises(rt.Error) as caught:
            next(generation)
        check(caught.value, INVALID_ARGUMENT, "consumed")
        assert stream.position == 0
        stream.feed([1])
        generation = stream.generate()
        stream.close()
        with pytest.raises(rt.Error) as caught:
            next(generation)
        check(caught.value, INVALID_ARGUMENT, "closed")
