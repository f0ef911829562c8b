"""State files: what they hold, how a restored stream goes on, what is refused, and that a kill loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import safe_open
from synthetic import CACHE, MEMORY, Reference, Weights, write_bundle
from test_errors import FAILED, INVALID_ARGUMENT, UNSUPPORTED, check
from test_stream import TOLERANCE
from variants import CONFIGS

import titans_runtime as rt
from titans_calibration.recipe import load_recipe, with_memory
from titans_export.bundle import read_bundle
from titans_export.model.memory_dtype import unpack_row

pytest_plugins = ["export_fixtures", "quantised_fixtures"]

TOKENS = np.random.default_rng(7).integers(0, 16, 60)
KEY = bytes(range(100, 132))
MAGIC = b"TITANSE1"
HERE = Path(__file__).parent


def header_of(content: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def data_of(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def seal(header: dict[str, Any], data: bytes) -> bytes:
    """The file of that header, with the hash that is right for it."""
    header = {**header, "__metadata__": {**header["__metadata__"], "xxh3_128": "0" * 32}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    whole = len(text).to_bytes(8, "little") + text + data
    return whole.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(whole).encode(), 1)


# ---- the format ----


def test_any_safetensors_reader_opens_it(session: rt.Session, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "user.tstate"
    stream, reference = session.stream(), Reference(weights)
    logits = stream.feed(TOKENS[:13], outputs="last")
    reference.feed(TOKENS[:13])
    stream.freeze()
    before = datetime.now(timezone.utc).replace(microsecond=0)
    stream.save(path)
    with safe_open(path, "numpy") as file:
        names = file.keys()
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in names}
    assert set(tensors) == {MEMORY, CACHE, "last_output"}
    assert {name: array.shape for name, array in tensors.items()} == {
        MEMORY: (1, 1, 38), CACHE: (1, 6), "last_output": (16,)
    }  # fmt: skip
    np.testing.assert_allclose(tensors[MEMORY][0, 0, :36].reshape(6, 6), reference.memory, **TOLERANCE)
    np.testing.assert_array_equal(tensors["last_output"], logits)
    assert {
        key: metadata[key] for key in ("format", "schema_version", "position", "learning", "backend", "device")
    } == {
        "format": "titans-state",
        "schema_version": "2",
        "position": "13",
        "learning": "false",
        "backend": "onnxruntime",
        "device": "cpu",
    }
    assert metadata["producer"] == f"titans-runtime {rt.__version__}"
    assert before <= datetime.fromisoformat(metadata["created"].replace("Z", "+00:00")) <= datetime.now(timezone.utc)
    manifest = json.loads((Path(session.info["bundle"]) / "manifest.json").read_text())
    assert json.loads(metadata["model"]) == {
        "name": "leaky-sum",
        "variant": "none",
        "weights_sha256": None,
        "weights_xxh3_128": manifest["files"]["weights.safetensors"]["xxh3_128"],
    }
    assert json.loads(metadata["memory"]) == {"dtype": "float32", "rounding": "nearest", "seed": 0}
    described = [{key: entry[key] for key in entry if key not in ("input", "output")} for entry in manifest["state"]]
    assert json.loads(metadata["state"]) == described


def test_the_hash_is_of_the_whole_file(session: rt.Session, tmp_path: Path) -> None:
    path = tmp_path / "user.tstate"
    session.stream().save(path)
    content = path.read_bytes()
    digits = header_of(content)["__metadata__"]["xxh3_128"].encode()
    assert content.count(digits) == 1
    assert xxhash.xxh3_128_hexdigest(content.replace(digits, b"0" * 32)).encode() == digits
    assert "last_output" not in header_of(content), "a fresh stream has none"


def test_read_state(session: rt.Session, tmp_path: Path) -> None:
    stream = session.stream()
    stream.feed(TOKENS[:9], outputs="none")
    stream.save(tmp_path / "plain.tstate")
    stream.save(tmp_path / "sealed.tstate", KEY)
    for state in (rt.read_state(tmp_path / "plain.tstate"), rt.read_state(tmp_path / "sealed.tstate", bytearray(KEY))):
        assert (state.position, state.learning) == (9, True)
        assert [entry["name"] for entry in state.state] == [MEMORY, CACHE]
        for name, values in stream.memory().items():
            np.testing.assert_array_equal(state.memory()[name], values)
        np.testing.assert_array_equal(state.tensors["last_output"], stream.feed([], outputs="last"))
    with pytest.raises(AttributeError):
        state.position = 3  # type: ignore[misc]


# ---- going on ----


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 60])
def test_a_restored_stream_goes_on(session: rt.Session, weights: Weights, tmp_path: Path, cut: int) -> None:
    stream, reference = session.stream(), Reference(weights)
    stream.feed(TOKENS[:cut], outputs="none")
    stream.save(tmp_path / "user.tstate")
    restored = session.restore(tmp_path / "user.tstate")
    assert (restored.position, restored.learning) == (cut, True)
    more = np.concatenate([TOKENS[cut:], TOKENS[:5]])
    got = restored.feed(more)
    np.testing.assert_array_equal(got, stream.feed(more))
    np.testing.assert_allclose(got, reference.feed(np.concatenate([TOKENS[:cut], more]))[cut:], **TOLERANCE)


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("kernel", ["auto", "off"])
def test_every_variant_bit_by_bit(bundles: dict[str, Path], variant: str, kernel: str, tmp_path: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 61, 90)
    path = tmp_path / "user.tstate"
    with rt.Session(bundles[variant], threads=1, memory_kernel=kernel) as session:
        whole = session.stream()
        for cut in (5, 37, 64):  # in open chunks and at a chunk's end
            whole.feed(tokens[whole.position : cut], outputs="none")
            whole.save(path)
            restored = session.restore(path)
            twin = whole.fork()
            np.testing.assert_array_equal(restored.feed(tokens[cut:]), twin.feed(tokens[cut:]))
            for name, values in twin.memory().items():
                np.testing.assert_array_equal(restored.memory()[name], values)
            assert list(restored.generate(8, seed=cut)) == list(twin.generate(8, seed=cut))


@pytest.mark.parametrize("variant", ["mac", "lmm"])
def test_from_our_kernel_to_standard_operators(bundles: dict[str, Path], variant: str, tmp_path: Path) -> None:
    """What one has learned the other goes on with: within the rounding of what follows, as if it had always run."""
    tokens = np.random.default_rng(3).integers(0, 61, 90)
    path = tmp_path / "user.tstate"
    sessions = [rt.Session(bundles[variant], threads=1, memory_kernel=kernel) for kernel in ("auto", "off")]
    if sessions[0].info["memory_kernel"] == "standard-operators":
        pytest.skip("the memory kernel is not built: make setup, with its headers in .deps")
    for one, other in (sessions, reversed(sessions)):
        stream = one.stream()
        stream.feed(tokens[:45], outputs="none")
        stream.save(path)
        restored = other.restore(path)
        np.testing.assert_allclose(restored.feed(tokens[45:]), stream.feed(tokens[45:]), rtol=0, atol=1e-4)


def test_in_another_process(session: rt.Session, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "user.tstate"
    stream = session.stream()
    stream.feed(TOKENS[:30], outputs="none")
    stream.freeze()
    stream.save(path, KEY)
    code = (
        "import sys, titans_runtime as rt\n"
        f"stream = rt.Session({str(bundle)!r}, threads=1).restore({str(path)!r}, bytes(range(100, 132)))\n"
        "print(stream.position, stream.learning, *stream.generate(12, seed=5))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["30", "False", *map(str, stream.generate(12, seed=5))], result.stderr


def test_vectors(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "vectors.titans", Weights.random(5, outputs=3), vectors=True)
    given = np.random.default_rng(2).normal(size=(20, 5)).astype(np.float32)
    with rt.Session(bundle, threads=1) as session:
        stream = session.stream()
        last = stream.feed(given[:9], outputs="last")
        stream.save(tmp_path / "sensor.tstate")
        restored = session.restore(tmp_path / "sensor.tstate")
        np.testing.assert_array_equal(restored.feed(np.empty((0, 5), np.float32), outputs="last"), last)
        np.testing.assert_array_equal(restored.feed(given[9:]), stream.feed(given[9:]))


# ---- another dtype ----


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        ("bfloat16", "nearest"),
        ("bfloat16", "stochastic"),
        ("bfloat16", "error_feedback"),
        ("float16", "error_feedback"),
        ("int8", "nearest"),
        ("fp8", "error_feedback"),
    ],
)
def test_in_another_memory_dtype(
    small_bundle: Path, quantised_bundle: Callable[..., Path], dtype: str, rounding: str, tmp_path: Path
) -> None:
    """To a bundle whose memories are in fewer bits, and back: each field to the nearest, everything else as it is."""
    path = tmp_path / "user.tstate"
    other = quantised_bundle(with_memory(load_recipe("memory-bf16"), f"{dtype}:{rounding}"))
    layouts = {entry.name: entry.layout for entry in read_bundle(other).manifest.state}
    tokens = np.random.default_rng(4).integers(0, 96, 61)
    with rt.Session(small_bundle, threads=1) as full, rt.Session(other, threads=1) as narrow:
        stream = full.stream()
        stream.feed(tokens[:45], outputs="none")
        stream.save(path)
        exact = rt.read_state(path)
        restored = narrow.restore(path)
        restored.save(path)
        kept = rt.read_state(path)
        assert (restored.position, kept.position) == (45, 45)
        fields = exact.memory()
        for name, rows in kept.tensors.items():
            if not layouts.get(name):
                np.testing.assert_array_equal(rows, exact.tensors[name])
                continue
            for field, values in unpack_row(rows, layouts[name]).items():
                if field in ("chunk_updates", *(f"E{one}" for one in ("W0", "S0"))):
                    continue
                right = fields[f"{name}.{field}"]
                if field[0] not in "WS":
                    np.testing.assert_array_equal(values, right)
                    continue
                assert within_half_a_step(values, right, dtype), field
                np.testing.assert_array_equal(restored.memory()[f"{name}.{field}"], values)
                np.testing.assert_array_equal(kept.memory()[f"{name}.{field}"], values)
        back = full.restore(path)
        memories = back.memory()
        for name, right in fields.items():
            if name.rpartition(".")[2][0] not in "WS":
                np.testing.assert_array_equal(memories[name], right)
            elif rounding == "error_feedback":  # the kept errors are added again
                least = 2.0**-25 if dtype == "float16" else 0.0  # half the smallest that an error can be
                assert np.abs(memories[name] - right).max() <= 2 * np.abs(right).max() * STEP[dtype] ** 2 + least
            else:
                np.testing.assert_array_equal(memories[name], kept.memory()[name])
        # What the model makes of it: of the order of one rounding of its memory.
        exact_logits, narrow_logits = stream.feed(tokens[45:]), restored.feed(tokens[45:])
        assert np.abs(narrow_logits - exact_logits).max() <= 8 * STEP[dtype] * np.abs(exact_logits).max()


# Half the distance of neighbours, relative to the value, or to the largest of a block of 32 that share a scale; that of
# a scale, a bfloat16 rounded up, on top.
STEP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "int8": 1 / 127, "fp8": 2.0**-4}


def within_half_a_step(values: Any, right: Any, dtype: str) -> bool:
    if dtype in ("bfloat16", "float16"):
        bound = np.abs(right) * STEP[dtype] + 2.0**-24
    else:
        blocks = np.abs(right).reshape(*right.shape[:-1], -1, min(32, right.shape[-1])).max(-1)
        bound = np.repeat(blocks, min(32, right.shape[-1]), -1) * STEP[dtype]
    return bool((np.abs(values - right) <= bound).all())


# ---- what is refused ----


@pytest.fixture
def saved(session: rt.Session, tmp_path: Path) -> Path:
    stream = session.stream()
    stream.feed(TOKENS[:11], outputs="none")
    stream.save(tmp_path / "user.tstate")
    return tmp_path / "user.tstate"


def refuse_state(session: rt.Session, path: Path, status: int, *words: str, key: bytes | None = None) -> None:
    with pytest.raises(rt.Error) as caught:
        session.restore(path, key)
    check(caught.value, status, *words)
    assert path.name in str(caught.value)


def test_a_file_cut_or_altered(session: rt.Session, saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(0, len(content), 37):
        saved.write_bytes(content[:length])
        refuse_state(session, saved, FAILED)
        with pytest.raises(rt.Error):
            rt.read_state(saved)
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(content), 300):
        altered = bytearray(content)
        altered[at] ^= int(rng.integers(1, 256))
        saved.write_bytes(altered)
        with pytest.raises(rt.Error) as caught:
            session.restore(saved)
        assert caught.value.status in (FAILED, UNSUPPORTED)


def test_a_newer_version(session: rt.Session, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes().replace(b'"schema_version":"2"', b'"schema_version":"3"'))
    refuse_state(session, saved, UNSUPPORTED, "schema_version 2", "got 3", "TITANS-E0402")


def test_an_older_version(session: rt.Session, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes().replace(b'"schema_version":"2"', b'"schema_version":"1"'))
    refuse_state(session, saved, UNSUPPORTED, "schema_version 2", "got 1", "feed the stream again", "TITANS-E0403")


def test_a_state_of_another_model(saved: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other.titans", Weights.random(seed=9))
    with rt.Session(other) as session:
        refuse_state(session, saved, FAILED, "state of another model: expected leaky-sum", "weights")


def test_a_sealed_file_of_other_shapes(session: rt.Session, saved: Path) -> None:
    content = saved.read_bytes()
    header, data = header_of(content), data_of(content)
    saved.write_bytes(seal(header, data))
    assert session.restore(saved).position == 11
    header[MEMORY]["shape"] = [1, 2, 19]
    saved.write_bytes(seal(header, data))
    refuse_state(session, saved, FAILED, MEMORY, "[1, 1, 38]", "[1, 2, 19]")


def test_bad_keys_and_paths(session: rt.Session, saved: Path) -> None:
    stream = session.stream()
    for key in (b"short", b"", bytes(33)):
        with pytest.raises(rt.Error) as caught:
            stream.save(saved, key)
        check(caught.value, INVALID_ARGUMENT, "32 bytes", str(len(key)))
    with pytest.raises(rt.Error, match="a key as bytes"):
        stream.save(saved, "password")  # type: ignore[arg-type]
    with pytest.raises(rt.Error, match="without NUL"):
        stream.save("a\0b")
    with pytest.raises(rt.Error, match="No such file"):
        session.restore(saved.with_name("none.tstate"))
    with pytest.raises(rt.Error, match="not a regular file"):
        session.restore(saved.parent)
    with pytest.raises(rt.Error, match="closed"):
        closed = session.stream()
        closed.close()
        closed.save(saved)


# ---- encryption ----


def test_what_we_encrypt_another_library_opens(session: rt.Session, saved: Path, tmp_path: Path) -> None:
    stream = session.restore(saved)
    stream.save(tmp_path / "sealed.tstate", KEY)
    sealed = (tmp_path / "sealed.tstate").read_bytes()
    assert sealed[:8] == MAGIC
    plain = AESGCM(KEY).decrypt(sealed[8:20], sealed[20:], MAGIC)
    header, expected = header_of(plain), header_of(saved.read_bytes())
    for one in (header, expected):
        del one["__metadata__"]["created"], one["__metadata__"]["xxh3_128"]
    assert header == expected
    assert data_of(plain) == data_of(saved.read_bytes())
    with pytest.raises(InvalidTag):
        AESGCM(KEY).decrypt(sealed[8:20], sealed[20:], b"")  # the magic is authenticated


def test_what_another_library_encrypts_we_open(session: rt.Session, saved: Path) -> None:
    plain, nonce = saved.read_bytes(), os.urandom(12)
    expected = session.restore(saved).feed(TOKENS[11:])
    saved.write_bytes(MAGIC + nonce + AESGCM(KEY).encrypt(nonce, plain, MAGIC))
    np.testing.assert_array_equal(session.restore(saved, KEY).feed(TOKENS[11:]), expected)
    assert rt.read_state(saved, KEY).position == 11
    refuse_state(session, saved, INVALID_ARGUMENT, "no key was given")
    refuse_state(session, saved, FAILED, "wrong key", key=KEY[::-1])
    saved.write_bytes(MAGIC + nonce + AESGCM(KEY).encrypt(nonce, plain, b"TITANSE2"))
    refuse_state(session, saved, FAILED, "altered", key=KEY)
    saved.write_bytes(plain)
    refuse_state(session, saved, FAILED, "without encryption", key=KEY)


@pytest.mark.parametrize("library", ["/nowhere/libcrypto.so", "libm.so.6"])
def test_without_libcrypto(bundle: Path, tmp_path: Path, library: str) -> None:
    code = (
        "import titans_runtime as rt\n"
        f"stream = rt.Session({str(bundle)!r}, threads=1).stream()\n"
        f"stream.save({str(tmp_path / 'plain.tstate')!r})\n"
        "try:\n"
        f"    stream.save({str(tmp_path / 'sealed.tstate')!r}, bytes(32))\n"
        "except rt.Error as error:\n"
        "    print(error.status, error)\n"
    )
    environment = {**os.environ, "TITANS_LIBCRYPTO": library}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.startswith(f"{UNSUPPORTED} [state] encryption needs libcrypto: "), result.stderr
    assert "Fix: install OpenSSL" in result.stdout
    assert sorted(os.listdir(tmp_path)) == ["plain.tstate"]


# ---- marks ----


def test_marks(session: rt.Session, weights: Weights) -> None:
    stream, expected = session.stream(), Reference(weights).feed(TOKENS)
    stream.feed(TOKENS[:10], outputs="none")
    bytes_before = stream.state_bytes
    assert stream.mark() == 10
    assert stream.state_bytes - bytes_before == 4 * (38 + 6 + 16)  # one copy of the state
    first = stream.feed(TOKENS[10:20])
    assert stream.mark() == 20
    stream.freeze()
    stream.feed([3] * 15, outputs="none")
    assert stream.marks == [10, 20]
    stream.rewind(20)
    assert stream.learning
    np.testing.assert_allclose(stream.feed(TOKENS[20:]), expected[20:], **TOLERANCE)
    stream.rewind(10)
    assert (stream.position, stream.marks) == (10, [10])
    np.testing.assert_array_equal(stream.feed(TOKENS[10:20]), first)
    assert stream.fork().marks == []
    with pytest.raises(rt.Error) as caught:
        stream.rewind(20)
    check(caught.value, INVALID_ARGUMENT, "no mark at position 20", "marks are at 10")
    stream.unmark(10)
    assert (stream.marks, stream.state_bytes) == ([], bytes_before)
    with pytest.raises(rt.Error, match="no marks"):
        stream.unmark(10)
    with pytest.raises(rt.Error, match="position"):
        stream.rewind(-1)


# ---- kills and errors ----


@pytest.fixture(scope="module")
def killing(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    folder = tmp_path_factory.mktemp("killing")
    library = folder / "file_calls.so"
    command = [compiler, "-shared", "-fPIC", str(HERE / "file_calls.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    kills = os.environ.get("TITANS_STATE_KILLS", "40")
    command = [sys.executable, str(HERE / "state_killing.py"), str(bundle), "--calls", "--kills", kills]
    environment = {**os.environ, "LD_PRELOAD": f"{library}:{os.environ.get('LD_PRELOAD', '')}", "TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    outcome: dict[str, Any] = json.loads(result.stdout)
    return outcome


@pytest.mark.parametrize("how", ["kill", "halfway", "encrypted"])
def test_killed_at_every_call(killing: dict[str, Any], how: str) -> None:
    # Made aside, written, on the disk before it takes its name, and the folder after: in this order.
    kinds = killing["fail"]["kinds"]
    assert kinds[0] == "o" and kinds[1:].lstrip("w") == "srs", kinds
    kept = killing[how]["kept"]
    assert len(kept) >= len(kinds)
    # The old one up to the rename, the new one after.
    assert kept == sorted(kept) and set(kept) == {3, 17}, kept
    assert killing[how]["leftovers"] > 0


def test_killed_at_random(killing: dict[str, Any]) -> None:
    """TITANS_STATE_KILLS=500 kills as often."""
    random = killing["random"]
    assert random["kills"] > 0 and random["saves"] > 0 and random["positions"] > 1, random


def test_what_cannot_be_written_is_told(killing: dict[str, Any]) -> None:
    failures = {(error, kind): message for error, kind, message in reversed(killing["fail"]["outcomes"])}
    for kind in "ws":
        assert "No space left on device" in failures[errno.ENOSPC, kind]
        assert "Fix: free disk space" in failures[errno.ENOSPC, kind]
    assert "Input/output error" in failures[errno.EIO, "r"]
    file, folder = (message for *call, message in killing["fail"]["outcomes"] if call == [errno.EIO, "s"])
    assert "the previous file is intact" in file
    assert "cannot flush the folder" in folder and "the new file has its name" in folder
    assert failures[errno.EINTR, "w"] == failures[0, "w"] == "", "an interrupted or cut call is made again"
    message = killing["limit"]["message"]
    assert "[user.tstate]" in message and "File too large" in message and "the previous file is intact" in message
