"""The bundle on disk: names, hashes, reading with every check. docs/bundle.md is the contract."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from .errors import BundleError, NewerBundleError, OlderBundleError
from .schedule import check_schedule

FORMAT, SCHEMA_VERSION = "titans-bundle", 2
MANIFEST = "manifest.json"
WEIGHTS, STATE, GOLDEN, TOKENIZER = "weights.safetensors", "state.safetensors", "golden.safetensors", "tokenizer.json"
REQUIRED = (
    "producer",
    "model",
    "input",
    "output",
    "controls",
    "tokenizer",
    "state",
    "graphs",
    "golden",
    "weights",
    "initial_state",
    "files",
)
ENGINE_KEYS = (
    "name",
    "target",
    "compiler",
    "compiler_version",
    "precision",
    "device",
    "sm",
    "platform",
    "memory",
    "graphs",
)
_REMEDY = "export the checkpoint again or copy the bundle again"
_LONGEST_MANIFEST = 16 << 20  # as the runtime has it
_QUANTISE_AGAIN = "quantize again or copy the bundle again"


def file_entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file as the manifest records them."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there and unchanged."""

    path: Path
    manifest: dict[str, Any]

    def graph_paths(self) -> dict[str, Path]:
        """Graph name to its ONNX file, in the schedule's order."""
        return {graph["name"]: self.path / graph["file"] for graph in self.manifest["graphs"]}

    @property
    def tolerance(self) -> float:
        """How far logits may be from the golden ones, absolute. Raises BundleError if the manifest's is no number."""
        value = self.manifest["golden"].get("tolerance")
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise BundleError("bundle", "golden.tolerance to be a finite number", repr(value), _REMEDY)
        return float(value)

    @property
    def takes_vectors(self) -> bool:
        """Whether streams consume vectors of floats, not tokens."""
        return bool(self.manifest["input"]["kind"] == "vectors")

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What `titans-export quantize` did, None of a bundle in float32. Raises BundleError."""
        found = self.manifest.get("quantization")
        if found is None:
            return None
        if not isinstance(found, dict) or not all(
            isinstance(found.get(key), dict) for key in ("recipe", "matmuls", "memory")
        ):
            raise BundleError(
                "bundle", "quantization with its recipe, matmuls and memory", repr(found)[:80], _QUANTISE_AGAIN
            )
        return found

    def golden(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Tokens (n,) int32 of one stream and the logits (n, vocab) float32 that follow each.

        Of a bundle that takes vectors: those, (n, input size) float32, and the vectors (n, output size) that follow.
        """
        from safetensors.numpy import load_file

        entry = self.manifest["golden"]
        tensors = load_file(self.path / entry["file"])
        keys = ("vectors", "outputs") if self.takes_vectors else ("tokens", "logits")
        found = [tensors[entry[key]] for key in keys]
        return found[0], found[1]

    def initial_state(self) -> dict[str, NDArray[np.float32]]:
        """The state of a fresh stream, by name."""
        from safetensors.numpy import load_file

        return load_file(self.path / self.manifest["initial_state"]["file"])


def engines(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest's engines, as far as this version reads them. Raises BundleError."""
    found = manifest.get("engines", [])
    if not isinstance(found, list) or not all(isinstance(engine, dict) for engine in found):
        raise BundleError("bundle", "engines of the manifest to be a list of objects", repr(found)[:80], _REMEDY)
    names = [engine.get("name") for engine in found]
    for engine, name in zip(found, names, strict=True):
        if missing := [key for key in ENGINE_KEYS if key not in engine]:
            raise BundleError("bundle", f"key {missing[0]!r} in the engine {name!r}", "none", _REMEDY)
        if not isinstance(name, str) or names.count(name) > 1:
            raise BundleError("bundle", "engines of different names", repr(name), _REMEDY)
        graphs = engine["graphs"]
        if not isinstance(graphs, list) or not all(isinstance(g, dict) and {"graph", "file"} <= set(g) for g in graphs):
            raise BundleError("bundle", f"graph and file of each graph of the engine {name}", "another", _REMEDY)
        weights = engine.get("weights")
        if weights is not None and not (isinstance(weights, dict) and isinstance(weights.get("file"), str)):
            raise BundleError("bundle", f"the file of the weights of the engine {name}", repr(weights)[:80], _REMEDY)
        if unlisted := [f for f in engine_files(engine) if not isinstance(f, str) or f not in manifest["files"]]:
            raise BundleError("bundle", f"{unlisted[0]!r} among the files of the manifest", "no such entry", _REMEDY)
    return found


def engine_files(engine: dict[str, Any]) -> list[str]:
    """The names of all files that an engine of the manifest has of its own."""
    weights = engine.get("weights")
    return [*(graph["file"] for graph in engine["graphs"]), *([weights["file"]] if weights else [])]


def with_engine(
    manifest: dict[str, Any], engine: dict[str, Any], files: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], set[str]]:
    """The manifest with the engine, of these files, in place of one of its name; and the files that one had."""
    dropped = {file for other in engines(manifest) if other["name"] == engine["name"] for file in engine_files(other)}
    kept = {name: entry for name, entry in manifest["files"].items() if name not in dropped}
    others = [other for other in engines(manifest) if other["name"] != engine["name"]]
    listed = dict(sorted({**kept, **files}.items()))
    return {**manifest, "engines": [*others, engine], "files": listed}, dropped


# Of each kind of input: its element type and the key of its size, the kind of the output, and what golden names.
_KINDS = {
    "tokens": ("int64", "vocab_size", "logits", ("tokens", "logits")),
    "vectors": ("float32", "size", "vectors", ("vectors", "outputs")),
}


def _check_streams(manifest: dict[str, Any]) -> None:
    """What streams consume and give. Raises BundleError."""
    for key in ("input", "output", "golden"):
        if not isinstance(manifest[key], dict):
            raise BundleError("bundle", f"{key} of the manifest to be an object", repr(manifest[key])[:80], _REMEDY)
    given, result, golden = manifest["input"], manifest["output"], manifest["golden"]
    if not isinstance(given.get("kind"), str) or given["kind"] not in _KINDS:
        raise BundleError("bundle", f"an input of kind {' or '.join(_KINDS)}", repr(given.get("kind")), _REMEDY)
    dtype, size, kind, tensors = _KINDS[given["kind"]]
    for entry, key, expected in ((given, "dtype", dtype), (result, "kind", kind), (result, "dtype", "float32")):
        if entry.get(key) != expected:
            name = "input" if entry is given else "output"
            wanted = f"{name}.{key} {expected!r} with an input of {given['kind']}"
            raise BundleError("bundle", wanted, repr(entry.get(key)), _REMEDY)
    for name, value in ((f"input.{size}", given.get(size)), ("output.size", result.get("size"))):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BundleError("bundle", f"{name} to be an integer from 1 on", repr(value), _REMEDY)
    if given["kind"] == "tokens" and result["size"] != given[size]:
        raise BundleError("bundle", f"output.size {given[size]}, the vocabulary", repr(result["size"]), _REMEDY)
    if absent := [key for key in tensors if not isinstance(golden.get(key), str)]:
        raise BundleError("bundle", f"the tensor's name golden.{absent[0]}", repr(golden.get(absent[0])), _REMEDY)
    if given["kind"] == "vectors" and manifest["tokenizer"] != {"kind": "none"}:
        raise BundleError("bundle", "no tokenizer with an input of vectors", repr(manifest["tokenizer"]), _REMEDY)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; which of two equal keys counts, readers do not agree on. Raises ValueError."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key that is there twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON has not")


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise BundleError("bundle", f"a file {MANIFEST} in {path}", "something that is no regular file", _REMEDY)
    try:
        if (size := file.stat().st_size) > _LONGEST_MANIFEST:
            raise BundleError("bundle", f"{MANIFEST} of at most {_LONGEST_MANIFEST} bytes", str(size), _REMEDY)
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except FileNotFoundError:
        got = "no such file" if path.exists() else f"no {path}"
        raise BundleError("bundle", f"a folder with {MANIFEST} at {path}", got, "give the path of a bundle") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError("bundle", f"{path / MANIFEST} to be readable JSON", str(error), _REMEDY) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError("bundle", f'"format": "{FORMAT}" in {path / MANIFEST}', "another", "give a Titans bundle")
    version = values.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise BundleError("bundle", f"a schema_version in {path / MANIFEST}", repr(version), _REMEDY)
    if version > SCHEMA_VERSION:
        raise NewerBundleError(
            "bundle",
            f"a schema version up to {SCHEMA_VERSION}",
            f"{version}",
            "upgrade titans-export to read this bundle",
        )
    if version < SCHEMA_VERSION:
        raise OlderBundleError(
            "bundle",
            f"schema version {SCHEMA_VERSION} in {path / MANIFEST}",
            f"{version}",
            f"make the bundle anew: titans-export export CHECKPOINT -o {path}",
        )
    if missing := [key for key in REQUIRED if key not in values]:
        raise BundleError("bundle", f"key {missing[0]!r} in {path / MANIFEST}", "none", _REMEDY)
    return values


def read_bundle(path: Path) -> Bundle:
    """Opens the bundle at `path` and checks schema version, sizes and hashes. Raises BundleError."""
    manifest = _manifest(path)
    _check_streams(manifest)
    check_schedule(manifest["graphs"], _REMEDY)
    if not isinstance(manifest["files"], dict):
        raise BundleError("bundle", "files of the manifest to be an object", repr(manifest["files"]), _REMEDY)
    for name, entry in manifest["files"].items():
        if not is_plain_name(name):
            raise BundleError("bundle", "plain file names in the manifest", repr(name), _REMEDY)
        file = path / name
        try:
            there = not file.is_symlink() and file.is_file()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            raise BundleError("bundle", f"the file {name} in {path}", "none", _REMEDY)
        if not isinstance(entry, dict) or not {"bytes", "xxh3_128"} <= set(entry):
            raise BundleError("bundle", f"size and hash of {name} in the manifest", repr(entry), _REMEDY)
        if file.stat().st_size != entry["bytes"]:
            raise BundleError("bundle", f"{name} of {entry['bytes']} bytes", f"{file.stat().st_size}", _REMEDY)
        if file_entry(file)["xxh3_128"] != entry["xxh3_128"]:
            raise BundleError("bundle", f"{name} with the hash that the manifest gives", "another", _REMEDY)
    for key in ("tokenizer", "weights", "initial_state"):
        if not isinstance(manifest[key], dict):
            raise BundleError("bundle", f"{key} of the manifest to be an object", repr(manifest[key])[:80], _REMEDY)
    entries = [*manifest["graphs"], manifest["golden"], manifest["weights"], manifest["initial_state"]]
    if manifest["tokenizer"].get("kind") == "file":
        entries.append(manifest["tokenizer"])
    listed = [entry.get("file") for entry in entries]
    if unlisted := [name for name in listed if not isinstance(name, str) or name not in manifest["files"]]:
        raise BundleError("bundle", f"{unlisted[0]!r} among the files of the manifest", "no such entry", _REMEDY)
    _check_state(manifest["state"])
    _check_graphs(path, manifest)
    return Bundle(path, manifest)


def is_plain_name(name: str) -> bool:
    """Whether a file of that name lies in the bundle itself, wherever the bundle is."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _check_state(state: Any) -> None:
    """What tools read of every state tensor. Raises BundleError."""
    if not isinstance(state, list) or not all(isinstance(entry, dict) for entry in state):
        raise BundleError("bundle", "state of the manifest to be a list of objects", repr(state)[:80], _REMEDY)
    for entry in state:
        for key in ("name", "input", "output", "dtype", "role"):
            if not isinstance(entry.get(key), str):
                raise BundleError("bundle", f"{key} of each state tensor", repr(entry.get(key))[:80], _REMEDY)
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(isinstance(extent, int) and extent > 0 for extent in shape):
            raise BundleError("bundle", f"a shape of {entry['name']}", repr(shape)[:80], _REMEDY)


def _check_graphs(path: Path, manifest: dict[str, Any]) -> None:
    """That what else opens graphs reads no file that is not listed. Raises BundleError."""
    from .onnx.external import check_external_data

    files = {manifest["weights"]["file"]}
    for graph in manifest["graphs"]:
        check_external_data(path / graph["file"], files)
    for engine in engines(manifest):
        if engine["compiler"] != "onnxruntime":
            continue
        own = {engine["weights"]["file"]} if engine.get("weights") else set()
        for graph in engine["graphs"]:
            check_external_data(path / graph["file"], files | own)
