"""`titans-export inspect`: the contents of a bundle or of a state file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .command import Command, emit, json_option, say
from .inspect_state import inspect_state
from .kinds import check_bundle, check_state
from .options import PATH, key_option
from .table import size, table

if TYPE_CHECKING:
    from ..bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The options of `inspect`; `bundle`, `numpy` and `key_file` are for states."""

    path: Path
    bundle: Path | None
    numpy: Path | None
    key_file: Path | None
    as_json: bool


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        "titans-export inspect mac.titans --json",
        "titans-export inspect user.tstate --bundle mac.titans",
        "titans-export inspect user.tstate --key-file user.key --numpy memory.npz",
    ),
)
@click.argument("path", type=PATH, metavar="BUNDLE|STATE")
@click.option("--bundle", type=PATH, help="For a state: compare its memory with a fresh stream of this bundle.")
@click.option("--numpy", type=PATH, metavar="NPZ", help="For a state: also write its memory to this file, as float32.")
@key_option
@json_option
def inspect(**values: Any) -> None:
    """Show the contents of a bundle or of a state file.

    For a bundle: model, graphs, state, files and where it can run. Sizes and hashes of all files are checked. For a
    state: its model and, for each memory, the norms of W and S and how much of the range of its dtype they use. NaN and
    infinity are reported first, with exit code 3.
    """
    _inspect(InspectOptions(**values))


def _inspect(options: InspectOptions) -> None:
    if not options.path.is_dir():
        check_state(options.path, "a bundle or a state file")
    if options.path.is_file() or options.path.suffix == ".tstate":
        inspect_state(options.path, options.bundle, options.numpy, options.key_file, options.as_json)
        return
    given = {"--bundle": options.bundle, "--numpy": options.numpy, "--key-file": options.key_file}
    if option := next((name for name, value in given.items() if value is not None), None):
        problem = f"{option} is for state files, and {options.path} is not one"
        raise UsageError("E0102", "inspect", problem, "give a .tstate file, or leave it out")
    check_bundle(options.path)
    from ..bundle import read_bundle
    from ..inspecting import inspect_bundle

    bundle = read_bundle(options.path)
    info = inspect_bundle(bundle)
    if options.as_json:
        emit(info)
    else:
        say(_text(info, bundle))


def _text(info: dict[str, Any], bundle: Bundle) -> str:
    from ..output_limits import describe

    model = info["model"]
    targets = ", ".join(f"{target['backend']} on {target['device']}" for target in info["targets"])
    head = [
        f"{info['bundle']}: {model['name']} ({model['variant']}), {model['parameters']:,} parameters",
        f"made by {info['producer']}, schema {info['schema_version']}, hashes ok",
        f"SHA-256 {info['sha256']}",
        f"{_streams(info)}, runs on: {targets}",
        *_source(model.get("source") or {}),
    ]
    if bundle.manifest.stability:
        head.append(describe(bundle.manifest.stability))
    graphs = [
        (g["name"], g["tokens"], g["stride"], _spans(g["offsets"]), sum(g["operators"].values()), _most(g["operators"]))
        for g in info["graphs"]
    ]
    state = [(s["name"], s["role"], s["dtype"], _shape(s["shape"]), size(s["bytes"])) for s in info["state"]]
    sections = [
        "\n".join(head),
        _quantization(info["quantization"]),
        _guard(info["guard"]),
        table(("graph", "tokens", "stride", "offsets", "nodes", "most frequent operators"), graphs),
        _memories(info["graphs"]),
        _engines(info),
        table(("state", "role", "dtype", "shape", "size"), state) + f"\none stream: {size(info['state_bytes'])}",
        table(("file", "size"), [(f["name"], size(f["bytes"])) for f in info["files"]]),
    ]
    return "\n\n".join(section for section in sections if section)


def _source(source: dict[str, Any]) -> list[str]:
    """What was unusual about the checkpoint, in a line; empty if nothing was."""
    parts = []
    if source.get("weights"):
        parts.append(f"state dict {source['weights']}")
    if source.get("dtypes"):
        parts.append(f"weights saved in {', '.join(source['dtypes'])}")
    if defaults := source.get("library_defaults"):
        parts.append(f"library defaults for {', '.join(defaults)}")
    return [f"exported from: {'; '.join(parts)}"] if parts else []


def _streams(info: dict[str, Any]) -> str:
    """Input and output of a stream."""
    if info["input"]["kind"] == "vectors":
        return f"input vectors of {info['input']['size']} floats, output vectors of {info['output']['size']}"
    return f"vocabulary {info['vocab_size']}, tokenizer {info['tokenizer']['kind']}"


def _quantization(entry: dict[str, Any] | None) -> str:
    """The quantisation in a few lines; empty for a float32 bundle."""
    if entry is None:
        return ""
    recipe, data, memory = entry["recipe"], entry.get("data"), entry["memory"]
    about = f" ({recipe['description']})" if recipe.get("description") else ""
    counts = ", ".join(f"{count} in {format}" for format, count in entry["formats"].items())
    lines = [f"quantised with recipe {recipe.get('name', '?')}{about}", f"matmuls: {counts or 'none'}"]
    if kept := [name for name, format in entry["matmuls"].items() if format == "float32"]:
        lines.append(f"kept in float32: {', '.join(kept)}")
    if {"weights_bytes", "float32_weights_bytes"} <= set(entry):
        lines.append(f"weights: {size(entry['weights_bytes'])}, in float32 {size(entry['float32_weights_bytes'])}")
    rounding = "" if memory.get("dtype") == "float32" else f", rounding {memory.get('rounding')}"
    lines.append(f"memory dtype: {memory.get('memory_dtype')}{rounding}")
    if data:
        lines.append(f"calibrated on {data.get('tokens')} tokens in {data.get('streams')} streams")
    if "max_abs_error" in entry:
        lines.append(f"maximum difference from the float32 model's golden outputs: {entry['max_abs_error']:.3g}")
    return "\n".join(lines)


def _guard(entry: dict[str, Any] | None) -> str:
    """Policy and limits of the memory; empty without limits."""
    fields = entry["fields"] if entry else {}
    rows = [(name, one.get("seen", "-"), one["limit"]) for name, one in fields.items() if "limit" in one]
    if not entry or not (rows or entry.get("policy", "off") != "off"):
        return ""
    restart = f", the memory is reset every {entry['restart_every']} tokens" if entry.get("restart_every") else ""
    head = f"guard: policy {entry.get('policy', 'off')}{restart}"
    return "\n".join([head, table(("norm of", "largest seen", "limit"), rows)] if rows else [head])


def _spans(offsets: list[int]) -> str:
    """Ascending numbers, with runs written as 0-14."""
    spans: list[list[int]] = []
    for offset in offsets:
        if spans and spans[-1][-1] + 1 == offset:
            spans[-1][1:] = [offset]
        else:
            spans.append([offset])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _engines(info: dict[str, Any]) -> str:
    sizes = {file["name"]: file["bytes"] for file in info["files"]}
    rows = [
        (
            e["name"],
            e["target"],
            f"{e['compiler']} {e['compiler_version']}",
            e["precision"],
            e["memory"],
            ", ".join(graph["graph"] for graph in e["graphs"]),
            size(sum(sizes[graph["file"]] for graph in e["graphs"])),
        )
        for e in info["engines"]
    ]
    header = ("engine", "target", "compiler", "precision", "memory", "graphs", "size")
    return table(header, rows) if rows else ""


def _memories(graphs: list[dict[str, Any]]) -> str:
    """The memory nodes, one line for nodes with equal attributes."""
    rows: dict[tuple[str, str], int] = {}
    for graph in graphs:
        for node in graph["neural_memory"]:
            text = ", ".join(f"{name} {_value(value)}" for name, value in node["attributes"].items())
            rows[graph["name"], text] = rows.get((graph["name"], text), 0) + 1
    return table(("graph", "memory nodes", "attributes"), [(name, n, text) for (name, text), n in rows.items()])


def _most(operators: dict[str, int]) -> str:
    """The first few counts of a sorted list."""
    return ", ".join(f"{name} {count}" for name, count in list(operators.items())[:5])


def _value(value: Any) -> str:
    return _shape(value) if isinstance(value, list) else str(value)


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))
