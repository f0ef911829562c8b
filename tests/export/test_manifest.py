"""The typed manifest against docs/bundle.md: every key is read, and a wrong one is refused by its path."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import manifest_json

from titans_export import manifest as records
from titans_export import strict_json
from titans_export.dtypes import BLOCK, DTYPES, MEMORY_DTYPES, SCALED, field_words
from titans_export.engines.targets import ORT, RTX, TARGETS, TENSORRT
from titans_export.errors import BundleError, NewerBundleError, OlderBundleError
from titans_export.manifest import Entry, Manifest, parse_manifest
from titans_export.schedule import LONGEST_PERIOD

ROOT = Path(__file__).resolve().parents[2]
FREE = ("config", "recipe", "library_defaults")  # objects with any keys


def _examples() -> list[Any]:
    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


MANIFEST, CONTROLS, STATE, GRAPHS, VECTORS, SAMPLE, STABILITY, QUANTIZATION, GUARD, ENGINE = _examples()


def _listed(*names: str) -> dict[str, Any]:
    return {name: {"bytes": 1, "xxh3_128": "0" * 32} for name in names}


def full() -> dict[str, Any]:
    """The examples of docs/bundle.md as one manifest, with every optional key."""
    graphs = [{**graph, "offsets": [0]} for graph in MANIFEST["graphs"]]
    own = _listed(ENGINE["graphs"][0]["file"], ENGINE["weights"]["file"])
    found = {**MANIFEST, **CONTROLS, **SAMPLE, **STABILITY, "graphs": graphs, "files": {**MANIFEST["files"], **own}}
    state = [{**STATE, "name": "layers.1.memory", "input": "layers.1.memory", "output": "layers.1.memory.next"}]
    return copy.deepcopy(
        {
            **found,
            "state": [*MANIFEST["state"], *state],
            "quantization": QUANTIZATION,
            "guard": GUARD,
            "engines": [ENGINE],
        }
    )


def vectors() -> dict[str, Any]:
    """The example of a bundle that takes vectors."""
    return copy.deepcopy({**MANIFEST, **VECTORS})


def entries(value: Any) -> Iterator[Entry]:
    """Every object of a typed manifest."""
    if isinstance(value, Entry):
        yield value
        for field in fields(value):
            yield from entries(getattr(value, field.name))
    elif isinstance(value, tuple):
        for one in value:
            yield from entries(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from entries(one)


def places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Container, key and key path of every value, except within objects with any keys."""
    for key in value if isinstance(value, dict) else range(len(value)):
        where = f"{path}[{key}]" if isinstance(value, list) else f"{path}.{key}".lstrip(".")
        yield value, key, where
        if isinstance(value[key], (dict, list)) and key not in FREE:
            yield from places(value[key], where)


def at(value: Any, path: str) -> tuple[Any, Any]:
    """Container and key of a key path."""
    return next((container, key) for container, key, where in places(value) if where == path)


def test_every_documented_key_is_read() -> None:
    used: dict[str, set[str]] = {}
    for given in (full(), vectors(), {**manifest_json(), "graphs": GRAPHS}):
        if given["graphs"] is GRAPHS:
            given["files"].update(_listed(*(graph["file"] for graph in GRAPHS)))
        for entry in entries(Manifest.from_json(given)):
            assert not entry.extra, f"{type(entry).__name__} does not read {list(entry.extra)}"
            names = {field.name for field in fields(entry) if getattr(entry, field.name) is not None}
            used.setdefault(type(entry).__name__, set()).update(names)
    known = {
        name: {field.name for field in fields(cls)}
        for name, cls in inspect.getmembers(records, inspect.isclass)
        if issubclass(cls, Entry) and cls is not Entry
    }
    assert used == known, "a key of titans_export/manifest.py is in no example of docs/bundle.md"


@pytest.mark.parametrize("given", [full(), vectors(), manifest_json()], ids=["full", "vectors", "small"])
def test_writing_gives_what_was_read(given: dict[str, Any], tmp_path: Path) -> None:
    read = Manifest.from_json(given)
    read.write(tmp_path)
    assert parse_manifest((tmp_path / "manifest.json").read_text()) == read
    written = read.to_json()
    assert list(written) == [key for key in written if key in given], "keys in the order of the manifest"
    for graph in given["graphs"]:
        if graph.get("offsets") == [0]:
            del graph["offsets"]  # the default is left out
    for engine in written.get("engines", []):
        engine["graphs"] = [{**graph, "weights": graph.get("weights", [])} for graph in engine["graphs"]]
    assert written == given


def test_unknown_keys_are_kept() -> None:
    given = full()
    objects = [container[key] for container, key, _ in places(given) if isinstance(container[key], dict)]
    for one in [given, *objects]:
        names = (given["files"], given["quantization"]["matmuls"], given["guard"]["fields"])  # objects with any keys
        if all(one is not each for each in names):
            one["later"] = {"a": [1]}
    read = Manifest.from_json(given)
    found = list(entries(read))
    assert len(found) > 30 and all(entry.extra == {"later": {"a": [1]}} for entry in found)
    again = read.to_json()
    assert again["later"] == again["state"][0]["layout"][0]["later"] == again["engines"][0]["plugin"]["later"]
    assert Manifest.from_json(again) == read


def _wrong(value: Any) -> list[Any]:
    """Values of other types."""
    if isinstance(value, str):
        return [7, ["x"], {}, True]
    if isinstance(value, (int, float)):
        return ["1", -1, True, [1], {}]
    return [7, "x", {} if isinstance(value, list) else [], True]


KEYS = [path for _, _, path in places(full()) if path != "format"]


@pytest.mark.parametrize("path", KEYS)
def test_a_wrong_type_is_refused_by_its_path(path: str) -> None:
    container, key = at(full(), path)
    for wrong in _wrong(container[key]):
        given = full()
        container, key = at(given, path)
        container[key] = wrong
        with pytest.raises(BundleError) as caught:
            Manifest.from_json(given)
        message = str(caught.value)
        assert message.startswith(f"[manifest.json] {path}: expected "), message
        assert ", got " in message and message.endswith("(TITANS-E0205)")


# Without list indices. The keys that a default replaces; all others are required.
OPTIONAL = {
    "controls.valid", "engines", "engines.cuda", "engines.driver", "engines.graphs.weights", "engines.state_in_place",
    "engines.weights", "format", "golden.positions", "golden.sample", "golden.sample.log_sum_exp",
    "graphs.offsets", "guard", "guard.data", "guard.fields.layers.0.memory.S0.limit",
    "guard.fields.layers.0.memory.S0.seen", "guard.fields.layers.0.memory.W0.limit",
    "guard.fields.layers.0.memory.W0.seen", "guard.margin", "guard.policy", "guard.restart_every",
    "model.config", "model.source", "model.source.format",
    "model.source.dtypes", "model.source.library_defaults", "model.source.weights", "model.source.weights_sha256",
    "quantization", "quantization.data", "quantization.float32_weights_bytes",
    "quantization.max_abs_error", "quantization.memory.dtype", "quantization.memory.rounding",
    "quantization.memory.seed", "quantization.seed", "quantization.weights_bytes", "schema_version", "stability",
    "state.chunk", "state.layout", "state.layout.at_start", "state.layout.dtype", "state.layout.kind",
    "state.layout.of", "state.layout.written", "state.operator", "state.rows", "state.written",
}  # fmt: skip
# Keys whose defaults contradict another key of the example.
CONTRADICTING = {
    "controls.slots",
    "engines[0].alias", "engines[0].plugin", "state[0].layout", "state[0].layout[0].kind", "state[0].layout[1].kind",
    "state[2].layout[1].dtype",
}  # fmt: skip


def test_a_missing_key_is_refused_by_its_path() -> None:
    optional, example = set(), full()
    for holder, _, path in places(example):
        names = (example["files"], example["quantization"]["matmuls"], example["guard"]["fields"])
        if isinstance(holder, list) or any(holder is each for each in names):
            continue
        given = full()
        container, key = at(given, path)
        del container[key]
        try:
            Manifest.from_json(given)
        except BundleError as error:
            if f"missing field {path}. " in str(error):
                continue
            assert path in CONTRADICTING, error
        else:
            optional.add(re.sub(r"\[\d+\]", "", path))
    assert optional == OPTIONAL


CONTRADICTIONS: dict[str, tuple[str, Any, str]] = {
    "a newer engine name": ("engines[0].name", "none", "engines[0].name: expected a name other than none"),
    "an engine of a GPU without sm": ("engines[0].sm", [], "engines[0].sm: expected the compute capabilities"),
    "a plugin that is not used": ("engines[0].memory", "kernel", 'engines[0].memory: expected "plugin"'),
    "in place without a plugin's alias": ("engines[0].alias", None, "engines[0].state_in_place: expected []"),
    "a foreign tensor in place": ("engines[0].state_in_place[0]", "x", "engines[0].state_in_place[0]: expected the"),
    "a foreign graph": ("engines[0].graphs[0].graph", "x", "engines[0].graphs[0].graph: expected one of"),
    "no decode graph in an engine": (
        "engines[0].graphs[0].graph",
        "chunk",
        "engines[0].graphs: expected a graph with tokens = 1",
    ),
    "a file that is not listed": ("weights.file", "x.safetensors", "weights.file: x.safetensors is not listed"),
    "a path": ("graphs[0].file", "../x", "graphs[0].file: expected a plain file name"),
    "two graphs of one name": ("graphs[0].name", "chunk", "two uses of the graph name chunk"),
    "two fields of one name": ("state[0].layout[1].name", "W0", "two uses of the memory field name"),
    "two tensors of one input": ("state[1].input", "tokens", "two uses of the graph input name tokens"),
    "an input that is an output": ("state[1].output", "learn", "two uses of the graph input and output name learn"),
    "a field beyond its row": ("state[0].layout[1].offset", 4000, "state[0].layout[1]: 1024 words from 4000 exceed"),
    "an unknown memory dtype": ("state[0].layout[0].dtype", "int3", "state[0].layout[0].dtype: expected one of"),
    "a memory of float16": ("state[0].dtype", "float16", 'state[0].dtype: expected "float32"'),
    "a state of two streams": ("state[1].shape[0]", 2, "state[1].shape: expected [1, ...]"),
    "the chunk of a cache": ("state[1].chunk", 4, "state[1].chunk: expected no such key"),
    "written rows beyond the cache": ("state[1].written.first[1]", 73, "state[1].written.first[1]: expected"),
    "written rows that overlap": ("state[1].written.first[1]", 71, "state[1].written.first[1]: expected"),
    "another axis": ("state[1].written.axis", 4, "state[1].written.axis: expected an integer from 0 to 3"),
    "another vocabulary": ("output.size", 255, "output.size: expected an integer from 256 to 256"),
    "the output of vectors": ("output.kind", "vectors", 'output.kind: expected "logits"'),
    "the golden outputs of vectors": ("golden.logits", ..., "missing field golden.logits"),
    "a tokenizer without its file": ("tokenizer.file", ..., "missing field tokenizer.file"),
    "offsets out of order": ("graphs[0].offsets", [3, 1], "graphs[0].offsets[1]: expected ascending offsets"),
    "no offsets": ("graphs[0].offsets", [], "graphs[0].offsets: expected at least one offset"),
    "sketches without a name": ("golden.sample.sketches", ..., "missing field golden.sample.sketches"),
    "a negative seed": ("golden.sample.seed", -1, "golden.sample.seed: expected an integer from 0"),
    "a limit of no norm": ("guard.fields", {"layers.0.memory.m": {}}, "guard.fields.layers.0.memory.m: expected the"),
    "a limit of 0": ("guard.margin", 0, "guard.margin: expected a finite number above 0"),
    "an unknown policy": ("guard.policy", "stop", "guard.policy: expected one of"),
    "a tolerance that is not finite": ("golden.tolerance", float("inf"), "golden.tolerance: expected a finite number"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused(case: str) -> None:
    path, value, words = CONTRADICTIONS[case]
    given = full()
    parent, _, key = path.rpartition(".")
    if re.search(r"\]$", path):
        container, name = at(given, path)
        container[name] = value
    else:
        container, name = at(given, parent)
        if value is ...:
            del container[name][key]
        else:
            container[name][key] = value
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{", BundleError, "not JSON"),
        ("[]", BundleError, "is not a bundle"),
        ('{"format": "zip"}', BundleError, "E0201"),
        ('{"format": "titans-bundle"}', BundleError, "schema_version: expected an integer from 1, got null"),
        ('{"format": "titans-bundle", "schema_version": true}', BundleError, "schema_version: expected an integer"),
        ('{"format": "titans-bundle", "schema_version": 3}', NewerBundleError, "E0202"),
        ('{"format": "titans-bundle", "schema_version": 1}', OlderBundleError, "titans-export export CHECKPOINT"),
        ('{"format": "titans-bundle", "format": "x"}', BundleError, 'key "format" twice'),
        ('{"format": NaN}', BundleError, "NaN is not a JSON number"),
        ('{"format": ' + "[" * 70 + "]" * 70 + "}", BundleError, "64 levels"),
        ("[" * 100_000, BundleError, "deeper than 64 levels"),
    ],
    ids=range(11),
)
def test_texts_that_are_no_manifest(text: str, kind: type[BundleError], words: str) -> None:
    with pytest.raises(kind) as caught:
        parse_manifest(text)
    assert words in str(caught.value)


def source(name: str) -> str:
    """A file of the runtime."""
    [path] = (ROOT / "runtime" / "src").rglob(name)
    return path.read_text(encoding="utf-8")


def test_dtypes_are_those_of_the_runtime() -> None:
    rows = re.findall(r'\{DType::k\w+, "(\w+)", "(\w+)", (\d+)\}', source("tensor.h"))
    assert {name: (safetensors, int(size)) for name, safetensors, size in rows} == {
        name: (dtype.safetensors, dtype.bytes) for name, dtype in DTYPES.items()
    }
    for name in MEMORY_DTYPES:
        assert f'"{name}"' in source("field_dtype.cpp")


def test_dtypes_are_those_of_the_python_package() -> None:
    state = pytest.importorskip("titans_runtime._state", exc_type=ImportError, reason="the runtime is not built")
    sizes = {name: np.dtype(dtype).itemsize for name, dtype in state._DTYPES.items()}
    assert sizes == {dtype.safetensors: dtype.bytes for dtype in DTYPES.values()}
    assert state._BLOCK == BLOCK


def test_limits_are_those_of_the_runtime() -> None:
    assert f"kSchemaVersion = {records.SCHEMA_VERSION};" in source("manifest.h")
    assert f"kLongest = std::size_t{{{records.LONGEST_MANIFEST >> 20}}} << 20;" in source("manifest.cpp")
    assert f"kDeepest = {strict_json.DEEPEST};" in source("json_reader.cpp")
    assert LONGEST_PERIOD == 1 << 20 and "kLongestPeriod = std::int64_t{1} << 20;" in source("schedule.cpp")


def test_targets_are_those_of_the_runtime() -> None:
    """The runtime names the target that fits a device when no engine does."""
    code = source("engine_choice.cpp")
    rows = re.findall(r'\{(\d+), "[^"]*", "([\w-]+)"\}', code)
    assert {name: int(sm) for sm, name in rows} == {
        name: target.sm for name, target in TARGETS.items() if target.sm is not None
    }
    assert re.search(rf'kCompilers\{{"{TENSORRT}", "{RTX}", "{ORT}"\}}', code), "in order of preference"


@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES)
def test_field_words_hold_a_field(memory_dtype: str) -> None:
    for shape, elements in (((), 1), ((5,), 5), ((3, 33), 99), ((64, 64), 4096)):
        bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(memory_dtype, 8) * elements
        rows, columns = (1, 1, *shape)[-2:]
        blocks = rows * -(-columns // 32) if memory_dtype in SCALED else 0
        assert field_words(shape, memory_dtype) == -(-bits // 32) + -(-blocks // 2)
