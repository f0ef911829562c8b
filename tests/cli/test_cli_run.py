from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import TEXT, environment, invoke, reseal, spawn

from titans_export.checkpoints import titans

pytest_plugins = ["cli_fixtures"]


class TestText:
    def test_json(self, shared_bundle: Path, text: Path) -> None:
        result = invoke("run", shared_bundle, "--text", text, "--json")
        assert result.code == 0, result.err
        report = result.json()
        assert report["tokens"] == report["bytes"] == report["position"] == len(TEXT)
        assert report["tokens_per_second"] > 0
        assert report["state_bytes"] == report["state_bytes_at_start"] > 0
        assert report["peak_rss_bytes"] > 1 << 20
        assert report["learning"] is True

    def test_bits_per_byte_are_those_of_pytorch(self, shared_bundle: Path, checkpoint: Path, text: Path) -> None:
        tokens = torch.tensor([list(TEXT)])
        with torch.no_grad():
            logits = titans.load(checkpoint).model(tokens)[0, :-1].double()
        nats = -logits.log_softmax(-1)[range(len(TEXT) - 1), tokens[0, 1:]].sum().item() + math.log(256)
        report = invoke("run", shared_bundle, "--text", text, "--json").json()
        assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)

    def test_frozen(self, shared_bundle: Path, text: Path) -> None:
        learned = invoke("run", shared_bundle, "--text", text, "--json").json()
        frozen = invoke("run", shared_bundle, "--text", text, "--freeze", "--json").json()
        assert frozen["learning"] is False
        assert frozen["bits_per_byte"] != learned["bits_per_byte"]

    def test_from_stdin(self, shared_bundle: Path, text: Path) -> None:
        named = invoke("run", shared_bundle, "--text", text, "--json").json()
        piped = invoke("run", shared_bundle, "--text", "-", "--json", stdin=TEXT).json()
        assert piped["bits_per_byte"] == named["bits_per_byte"]

    def test_empty(self, shared_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").touch()
        report = invoke("run", shared_bundle, "--text", tmp_path / "empty.txt", "--json").json()
        assert (report["tokens"], report["bits_per_byte"], report["tokens_per_second"]) == (0, None, None)

    def test_for_people(self, shared_bundle: Path, text: Path) -> None:
        result = invoke("run", shared_bundle, "--text", text)
        assert "bits per byte" in result.out
        assert result.err == ""


class TestPrompt:
    def test_same_seed_same_text(self, shared_bundle: Path) -> None:
        def run(seed: int) -> str:
            result = invoke("run", shared_bundle, "--prompt", "ab", "--max-tokens", 12, "--seed", seed)
            assert result.code == 0, result.err
            return result.out

        assert run(1) == run(1) != run(2)

    def test_json_holds_what_is_written(self, shared_bundle: Path) -> None:
        args = ("run", shared_bundle, "--prompt", "Once", "--max-tokens", 9, "--temperature", 0)
        report = invoke(*args, "--json").json()
        assert report["generated"] == invoke(*args).out
        assert (report["prompt_tokens"], report["generated_tokens"], report["position"]) == (4, 9, 13)
        assert report["stopped"] is False

    def test_stop(self, shared_bundle: Path) -> None:
        args = ("run", shared_bundle, "--prompt", "Once", "--max-tokens", 64, "--seed", 3, "--json")
        free = invoke(*args).json()["generated"]
        stop = next(free[i : i + 2] for i in range(4, len(free)) if free[i : i + 2].isascii())
        report = invoke(*args, "--stop", stop).json()
        assert report["stopped"] is True
        assert report["generated"] == free[: free.index(stop) + 2]

    def test_from_stdin(self, shared_bundle: Path) -> None:
        args = ("run", shared_bundle, "--max-tokens", 9, "--temperature", 0)
        assert invoke(*args, stdin=b"Once").out == invoke(*args, "--prompt", "Once").out

    def test_what_was_read_first_counts(self, shared_bundle: Path, text: Path) -> None:
        args = ("run", shared_bundle, "--prompt", "The", "--max-tokens", 16, "--temperature", 0, "--json")
        alone, after = invoke(*args).json(), invoke(*args, "--text", text).json()
        assert after["position"] == len(TEXT) + 3 + 16
        assert after["tokens"] == len(TEXT)
        assert after["generated"] != alone["generated"]

    def test_no_tokens_wanted(self, shared_bundle: Path) -> None:
        report = invoke("run", shared_bundle, "--prompt", "a", "--max-tokens", 0, "--json").json()
        assert (report["generated"], report["generated_tokens"]) == ("", 0)


def test_the_memory_kernel_is_a_choice(shared_bundle: Path, tmp_path: Path) -> None:
    args = (
        "run",
        shared_bundle,
        "--prompt",
        "Once",
        "--max-tokens",
        9,
        "--temperature",
        0,
        "--json",
        "--memory-kernel",
    )
    off, auto = invoke(*args, "off").json(), invoke(*args, "auto").json()
    assert off["memory_kernel"] == "standard-operators"
    assert auto["generated"] == off["generated"]
    assert auto["state_bytes"] < off["state_bytes"] or auto["memory_kernel"] == "standard-operators"
    assert invoke(*args, "on").code == 2
    from titans_runtime._library import _library_path

    here = Path(_library_path())
    for name in ("libtitans.so", "libtitans_backend_onnxruntime.so"):
        shutil.copy(here.with_name(name), tmp_path)
    result = spawn(*args, "require", TITANS_LIBRARY=str(tmp_path / "libtitans.so"))
    result.check_failure(4, "libtitans_onnxruntime_ops.so", "no such file")


def test_neither_torch_nor_onnx_is_needed(shared_bundle: Path, text: Path) -> None:
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'onnx', 'onnxscript', 'polygraphy', 'safetensors'):\n"
        "            raise ModuleNotFoundError('blocked ' + name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from titans_export.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    args = ("run", shared_bundle, "--text", text, "--prompt", "a", "--max-tokens", 3, "--json")
    child = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(child, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*child[:3], "inspect", child[4]], capture_output=True, text=True, env=environment())
    assert done.returncode == 4
    assert "pip install onnx" in done.stderr


def test_peak_memory_is_the_childs_own(shared_bundle: Path) -> None:
    """This process has torch in memory; what a child reports must not count that in."""
    report = spawn("run", shared_bundle, "--prompt", "a", "--max-tokens", 1, "--json").json()
    assert report["peak_rss_bytes"] < 200 << 20


class TestTokenizers:
    @pytest.fixture
    def words(self, tmp_path: Path) -> Path:
        tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install titans-export[tokenizer]")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([], trainer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path / "tokenizer.json"

    @pytest.fixture
    def worded(self, words: Path, bundle: Path) -> Path:
        """The bundle with a tokenizer file."""
        (bundle / "tokenizer.json").write_bytes(words.read_bytes())
        reseal(bundle, tokenizer={"kind": "file", "file": "tokenizer.json"})
        return bundle

    def test_run_with_a_file(self, worded: Path, text: Path) -> None:
        report = invoke("run", worded, "--text", text, "--prompt", "a", "--max-tokens", 5, "--json").json()
        assert report["bytes"] == len(TEXT)
        assert report["generated_tokens"] == 5

    @pytest.mark.parametrize("kind", ["bytes", "file"])
    def test_streams_take_and_give_text(self, kind: str, worded: Path, shared_bundle: Path) -> None:
        """Against the package `tokenizers`, or UTF-8, on the same tokens."""
        rt, tokenizers = pytest.importorskip("titans_runtime"), pytest.importorskip("tokenizers")
        written = "Grüße, 世界! Once upon a time"
        file = tokenizers.Tokenizer.from_file(str(worded / "tokenizer.json"))
        ids = file.encode(written, add_special_tokens=False).ids if kind == "file" else list(written.encode())

        def decode(tokens: list[int]) -> str:
            return str(file.decode(tokens)) if kind == "file" else bytes(tokens).decode(errors="replace")

        with rt.Session(worded if kind == "file" else shared_bundle) as session:
            stream, other = session.stream(), session.stream()
            assert (stream.feed_text(written, outputs="last") == other.feed(ids, outputs="last")).all()
            tokens = list(other.generate(max_tokens=50, temperature=1.5, seed=3))
            pieces = list(stream.fork().generate_text(max_tokens=50, temperature=1.5, seed=3))
            assert "".join(pieces) == decode(tokens)
            assert len(pieces) > 10
            whole = "".join(pieces)
            stop = whole[20:23]
            ended = "".join(stream.fork().generate_text(max_tokens=50, temperature=1.5, seed=3, stop=[stop, "\0none"]))
            assert ended == whole[: whole.index(stop) + 3]
            again = session.stream()
            assert "".join(again.generate_text(written, 50, 1.5, seed=3)) == whole
            with pytest.raises(rt.Error, match=r"encode the text: text\.encode"):
                stream.feed(written)
            with pytest.raises(rt.Error, match=r"write \[stop\]"):
                stream.generate_text(stop="x")

    def test_text_that_is_not_utf8(self, worded: Path, shared_bundle: Path, text: Path) -> None:
        text.write_bytes(TEXT + b"\xff")
        args = ("--text", text, "--json")
        invoke("run", worded, *args).check_failure(1, f"not UTF-8 at byte {len(TEXT)}", "--encoding-errors")
        replaced = invoke("run", worded, *args, "--encoding-errors", "replace").json()
        assert (replaced["bytes"], replaced["tokens"]) == (len(TEXT) + 1, len(TEXT) + 3)  # U+FFFD is three bytes
        assert invoke("run", shared_bundle, *args).json()["tokens"] == len(TEXT) + 1

    def test_special_tokens_are_shown_unless_hidden(self, worded: Path) -> None:
        spec = json.loads((worded / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"] = [{"id": i, "content": t, "special": True, **flags} for t, i in _first(spec, 200).items()]
        (worded / "tokenizer.json").write_text(json.dumps(spec))
        reseal(worded)
        args = ("run", worded, "--prompt", "a", "--max-tokens", 30, "--seed", 1, "--json")
        shown, hidden = invoke(*args).json(), invoke(*args, "--hide-special-tokens").json()
        assert shown["generated_tokens"] == hidden["generated_tokens"] == 30
        assert len(hidden["generated"]) < len(shown["generated"])

    def test_the_package_is_missing(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        (bundle / "tokenizer.json").write_text("{}")
        reseal(bundle, tokenizer={"kind": "file", "file": "tokenizer.json"})
        invoke("run", bundle, "--prompt", "a").check_failure(4, "pip install tokenizers")

    def test_no_tokenizer_at_all(self, bundle: Path) -> None:
        reseal(bundle, tokenizer={"kind": "none"})
        rt = pytest.importorskip("titans_runtime")
        with rt.Session(bundle) as session, pytest.raises(rt.Error, match="TITANS-E0110"):
            session.stream().feed_text("a")
        invoke("run", bundle, "--prompt", "a").check_failure(1, "tokenizer.json")


def _first(spec: dict[str, Any], count: int) -> dict[str, int]:
    """The first tokens of a vocabulary."""
    return {token: id for token, id in spec["model"]["vocab"].items() if id < count}
