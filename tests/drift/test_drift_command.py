"""`compare BUNDLE REFERENCE`: the command, the report and the page; and what is measured of recall."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recall_task
from cli_tools import TEXT, invoke, reseal
from numpy.typing import NDArray

from titans_export.drift import recall
from titans_export.drift.page import render

pytest_plugins = ["drift_fixtures"]
QUICK = ("--layers", 0, "--recall", 0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def report(drift_bundle: Path, rounded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One whole run, its page beside it."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_bytes(TEXT)
    args = ("--text", folder / "text.txt", "--window", 256, "--tolerance", 0.01, "--recall", 256, "--layers", 100)
    files = ("--html", folder / "drift.html", "--output", folder / "drift.json")
    result = invoke("compare", rounded, drift_bundle, *args, *files, "--json")
    result.check_failure(3, "position 0", "bits")
    found = result.json()
    assert json.loads((folder / "drift.json").read_text()) == found
    found["page"] = (folder / "drift.html").read_text(encoding="utf-8")
    return found


class TestCommand:
    def test_report(self, report: dict[str, Any], rounded: Path, drift_bundle: Path) -> None:
        assert (report["bundle"], report["reference"]) == (str(rounded), str(drift_bundle))
        assert report["passed"] is False and report["first_bad_position"] == 0
        assert report["positions"] == len(TEXT) and len(report["windows"]) == math.ceil(len(TEXT) / 256)
        assert report["max_abs_error"] == max(window["max_abs_error"] for window in report["windows"]) > 0.01
        assert report["bits_per_byte"] == report["bits_per_token"]
        assert report["bits_per_byte"]["bundle"] != report["bits_per_byte"]["reference"]
        assert {entry["layer"] for entry in report["layers"]["errors"]} == {"layers.0", "layers.0.memory"}
        assert [entry["distance"] for entry in report["recall"]["distances"]] == [64, 256]
        assert report["memory"][-1]["position"] == len(TEXT) and report["memory"][-1]["weights"] > 0
        sides = report["bundles"]
        assert sides["bundle"]["manifest_xxh3_128"] != sides["reference"]["manifest_xxh3_128"]
        assert report["verdict"].startswith("Not within tolerance: first exceeded at position 0.")

    def test_against_itself(self, drift_bundle: Path, text: Path) -> None:
        args = ("--text", text, "--tolerance", 0, "--bits-tolerance", 0, "--layers", 60, "--recall", 64, "--json")
        result = invoke("compare", drift_bundle, drift_bundle, *args)
        assert result.code == 0, result.err
        report = result.json()
        assert report["passed"] is True and report["max_abs_error"] == 0 and report["first_bad_position"] is None
        assert report["kl_bits"] == {"mean": 0, "max": 0} and report["top1_agreement"] == 1
        assert all(entry["relative_error"] == 0 for entry in report["layers"]["errors"])
        assert all(entry["bundle"] == entry["reference"] for entry in report["recall"]["distances"])
        assert report["verdict"].startswith("Within tolerance: over")

    def test_another_memory_kernel(self, drift_bundle: Path, text: Path) -> None:
        args = ("--text", text, "--reference-memory-kernel", "off", "--tolerance", 1e-3, "--recall", 0, "--json")
        report = invoke("compare", drift_bundle, drift_bundle, *args).json()
        assert report["passed"] is True
        assert report["bundles"]["reference"]["memory_kernel"] == "standard-operators"
        assert report["bundles"]["bundle"]["memory_kernel"] != "standard-operators"
        assert "standard-operators" in render(report)
        assert report["layers"] is None and "one kernel" in report["layers_missing"]

    def test_without_a_tolerance_anything_goes(self, drift_bundle: Path, rounded: Path) -> None:
        result = invoke("compare", rounded, drift_bundle, "--tokens", 200, *QUICK)
        assert result.code == 0, result.err
        assert result.out.startswith("No tolerance was given. Over 200 tokens, the bits are")
        assert "layers.0.memory" in result.out

    def test_bits_tolerance(self, drift_bundle: Path, rounded: Path, text: Path) -> None:
        """One direction or the other has larger bits."""
        both = ((rounded, drift_bundle), (drift_bundle, rounded))
        found = [invoke("compare", a, b, "--text", text, "--bits-tolerance", 0, *QUICK) for a, b in both]
        assert sorted(result.code for result in found) == [0, 3]

    def test_random_tokens_by_their_seed(self, drift_bundle: Path, rounded: Path) -> None:
        args = ("compare", rounded, drift_bundle, "--tokens", 50, *QUICK, "--json", "--seed")
        first, again, other = (invoke(*args, seed).json()["max_abs_error"] for seed in (1, 1, 2))
        assert first == again != other

    @pytest.mark.parametrize(
        ("args", "code", "words"),
        [
            (("--polygraphy",), 2, ("--polygraphy",)),
            (("--config", "train_mac"), 2, ("--config",)),
            (("--tolerance", "inf"), 2, ("--tolerance",)),
            (("--bits-tolerance", "nan"), 2, ("--bits-tolerance",)),
            (("--html", "nowhere/page.html"), 1, ("nowhere",)),
            (("--text", "no-such-file.txt"), 1, ("no-such-file.txt",)),
            (("--reference-device", "cuda:99", *QUICK), (1, 4), ()),
        ],
    )
    def test_what_does_not_go(
        self, drift_bundle: Path, args: tuple[str, ...], code: Any, words: tuple[str, ...]
    ) -> None:
        result = invoke("compare", drift_bundle, drift_bundle, *args)
        assert result.code in (code if isinstance(code, tuple) else (code,)), result.err
        result.check_failure(result.code, *words)

    def test_verify_names_this_command(self, drift_bundle: Path) -> None:
        result = invoke("verify", drift_bundle, "--against", drift_bundle)
        result.check_failure(2, f"titans-export compare {drift_bundle} {drift_bundle}", "TITANS-E0102")
        for option in ("--window", "--html", "--bits-tolerance"):
            invoke("verify", drift_bundle, option, 5).check_failure(2, f"unknown option {option}", "TITANS-E0101")

    def test_a_checkpoint_is_not_a_bundle(self, drift_bundle: Path, drift_checkpoint: Path) -> None:
        invoke("compare", drift_bundle, drift_checkpoint, *QUICK).check_failure(1)

    def test_an_empty_text(self, drift_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").touch()
        args = (drift_bundle, "--text", tmp_path / "empty.txt")
        invoke("compare", drift_bundle, *args).check_failure(1, "empty")

    def test_another_tokenizer(self, drift_bundle: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(drift_bundle, tmp_path / "other.titans"))
        reseal(other, tokenizer={"kind": "none"})
        args = (drift_bundle, "--tokens", 20)
        invoke("compare", other, *args).check_failure(1, "tokenizer")

    def test_a_damaged_bundle(self, drift_bundle: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(drift_bundle, tmp_path / "other.titans"))
        with (other / "weights.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\1\2\3\4")
        invoke("compare", drift_bundle, other).check_failure(1, "weights.safetensors")


class Page(HTMLParser):
    """What a page holds; its elements have to be closed in the order they were opened."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class TestPage:
    def test_needs_nothing_from_elsewhere(self, report: dict[str, Any]) -> None:
        page = report["page"]
        assert "//" not in page, page[page.index("//") - 80 : page.index("//") + 80]
        assert "@import" not in page and "<script" not in page
        parsed = Page(page)
        assert not [entry for entry in parsed.attributes if entry[0] in ("link", "script", "img", "iframe")]
        targets = [value for _, name, value in parsed.attributes if name in ("href", "src", "xlink:href")]
        targets += re.findall(r"url\(([^)]*)\)", page)
        ids = [value for _, name, value in parsed.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        assert targets and all(target.startswith("#") and target[1:] in ids for target in targets)

    def test_says_what_was_found(self, report: dict[str, Any]) -> None:
        parsed = Page(report["page"])
        for words in (
            "Drift of rounded.titans from mac.titans", "Not within tolerance", "First exceeded at position 0",
            "Bits per byte", "KL divergence", "Memory: distance of W", "Memory: distance of S", "Error of the layers",
            "Recall", "layers.0.memory", report["bundles"]["bundle"]["manifest_xxh3_128"], report["date"],
        ):  # fmt: skip
            assert words in parsed.text, words
        assert parsed.text.index("First exceeded at position 0") < parsed.text.index("Bits per byte")

    def test_every_plot_has_an_alternative_text(self, report: dict[str, Any]) -> None:
        parsed = Page(report["page"])
        plots = [value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "role")]
        texts = [value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "aria-label")]
        assert len(plots) == len(texts) == len(set(texts)) == 8
        assert all(re.search(r"\d", text) for text in texts)

    def test_colours_are_the_page_s(self, report: dict[str, Any]) -> None:
        drawn = "".join(re.findall(r"<svg.*?</svg>", report["page"], re.DOTALL))
        assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
        names = set(re.findall(r"var\(--([a-z0-9-]+)\)", drawn))
        assert names and all(f"--{name}:" in report["page"] for name in names)

    def test_with_names_that_could_be_markup(self, report: dict[str, Any]) -> None:
        bundles = {**report["bundles"], "bundle": {**report["bundles"]["bundle"], "name": "<b>&\"x'.titans"}}
        parsed = Page(render({**report, "bundles": bundles, "stream": "<script>.txt"}))
        assert "<b>&\"x'.titans" in parsed.text and "<script>.txt" in parsed.text

    def test_of_numbers_that_are_none(self, report: dict[str, Any]) -> None:
        """As the JSON has them: null where a number was not finite."""
        windows = [{**window, "kl_max": None, "bits": None, "bits_difference": None} for window in report["windows"]]
        memory = [{**entry, "weights": None} for entry in report["memory"]]
        Page(render({**report, "windows": windows, "memory": memory, "max_abs_error": None}))

    def test_of_a_bundle_against_itself(self, drift_bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "page.html"
        args = ("--tokens", 100, "--layers", 40, "--recall", 64, "--html", path)
        assert invoke("compare", drift_bundle, drift_bundle, *args).code == 0
        assert "the bits are the same" in Page(path.read_text(encoding="utf-8")).text


class Copier:
    """A stream that knows how a string goes on once it has read it: where the last three tokens came before, it is sure
    of what followed them then, up to `reach` tokens ago; else every token is equally likely.
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach

    def stream(self) -> Copier:
        return self

    def reset(self) -> None: ...

    def close(self) -> None: ...

    def score(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        known, out = dict[tuple[int, ...], int](), np.full(len(tokens), -math.log(256), np.float32)
        for at in range(3, len(tokens)):
            key = tuple(tokens[at - 3 : at].tolist())
            place = known.get(key)
            if place is not None and at - place <= self._reach and tokens[place] == tokens[at]:
                out[at] = math.log(0.5)
            known[key] = at
        return out


class Teller:
    """A stream that answers the recall task: it looks the key up in what was told up to `reach` tokens ago."""

    def __init__(self, reach: int) -> None:
        self._reach = reach

    def stream(self) -> Teller:
        self.reset()
        return self

    def reset(self) -> None:
        self._read: list[int] = []

    def close(self) -> None: ...

    def feed(self, tokens: NDArray[Any], outputs: str = "all") -> Any:
        out = np.zeros((len(tokens), recall_task.VOCAB_SIZE), np.float32)
        for i, token in enumerate(tokens.tolist()):
            places = [
                at for at, old in enumerate(self._read[-self._reach :]) if old == token and token < recall_task.KEYS
            ]
            if places:
                out[i, self._read[-self._reach :][places[0] + 1]] = 1
            self._read.append(token)
        return None if outputs == "none" else out


class TestRecall:
    def test_strings(self) -> None:
        """A token that is recalled saves 8 - 1 bits, all of a string but its first three."""
        text = np.random.default_rng(7).integers(0, 256, 5000, np.int32)
        sessions: Any = {"far": Copier(10_000), "near": Copier(200)}
        found = recall.measure_recall(Copier(0), sessions, "strings", 1024, text)  # type: ignore[arg-type]
        whole = 7 * (recall.STRING - 3) / recall.STRING
        assert [entry.distance for entry in found["far"]] == [64, 256, 1024]
        assert [entry.value for entry in found["far"]] == pytest.approx([whole] * 3, abs=0.05)
        assert [entry.value for entry in found["near"]] == pytest.approx([whole, 0, 0], abs=0.05)
        assert all(entry.reference == 0 for entry in found["far"])

    def test_pairs(self) -> None:
        sessions: Any = {"far": Teller(10_000), "near": Teller(150)}
        found = recall.measure_recall(
            Teller(1),
            sessions,
            "pairs",
            1024,
            np.empty(0, np.int32),
            trials=16,  # type: ignore[arg-type]
        )
        assert [entry.value for entry in found["far"]] == [1, 1, 1]
        assert found["near"][0].value == 1
        assert all(entry.value < 0.2 for entry in found["near"][1:])
        assert all(entry.reference < 0.2 for entry in found["far"])

    def test_episodes_are_those_of_the_task(self) -> None:
        tokens = recall.episodes(3 * recall_task.episode_length(recall.PAIRS, 10), 10, 4)
        like = recall_task.make_episodes(1, recall.PAIRS, 10, 0)
        assert recall.PAIRS_VOCABULARY == recall_task.VOCAB_SIZE
        for episode in tokens.reshape(3, -1):
            assert len(episode) == like.tokens.shape[1] and episode[0] == recall_task.START
            told = dict(episode[1 : 1 + 2 * recall.PAIRS].reshape(-1, 2).tolist())
            filler = episode[1 + 2 * recall.PAIRS :][:10]
            asked = episode[like.queries]
            assert np.all((filler >= recall_task.FIRST_FILLER) & (filler < recall_task.START))
            assert sorted(told) == sorted(asked.tolist()) and max(told) < recall_task.KEYS
            assert [told[key] for key in asked.tolist()] == episode[like.queries + 1].tolist()

    def test_the_task_suits_the_model(self) -> None:
        assert recall.task_of(160, {"kind": "none"}) == "pairs"
        assert recall.task_of(160, {"kind": "bytes"}) == recall.task_of(256, {"kind": "none"}) == "strings"
