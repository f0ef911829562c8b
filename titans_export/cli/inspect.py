"""`titans-export inspect`: what is in a bundle, or in the state of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .command import Command, emit, json_option
from .inspect_state import inspect_state
from .options import PATH, key_option
from .table import size, table


@click.command(
    cls=Command,
    examples=(
        "titans-export inspect mac.titans --json",
        "titans-export inspect user.tstate --bundle mac.titans",
        "titans-export inspect user.tstate --key-file user.key --numpy memory.npz",
    ),
)
@click.argument("path", type=PATH, metavar="BUNDLE|STATE")
@click.option("--bundle", type=PATH, help="Of a state: also how far its memory is from a fresh stream of this bundle.")
@click.option("--numpy", type=PATH, metavar="NPZ", help="Of a state: also write its memory to this file, as float32.")
@key_option
@json_option
def inspect(path: Path, bundle: Path | None, numpy: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Show what is in a bundle, or in the state of a stream.

    Of a bundle: its model, graphs, state and files, and where it can run. Sizes and hashes of all files are checked. Of
    a state: whose it is and, memory by memory, how large W and S are and how its dtype holds them. NaN and infinity
    are told first, and the exit code is 3.
    """
    if path.is_file() or path.suffix == ".tstate":
        inspect_state(path, bundle, numpy, key_file, as_json)
        return
    given = {"--bundle": bundle, "--numpy": numpy, "--key-file": key_file}
    if option := next((name for name, value in given.items() if value is not None), None):
        raise UsageError("inspect", f"a state file with {option}", f"{path}", "give a .tstate, or leave it out")
    from ..bundle import read_bundle
    from ..inspecting import inspect_bundle

    facts = inspect_bundle(read_bundle(path))
    if as_json:
        emit(facts)
    else:
        click.echo(_text(facts))


def _text(facts: dict[str, Any]) -> str:
    model = facts["model"]
    targets = ", ".join(f"{target['backend']} on {target['device']}" for target in facts["targets"])
    head = [
        f"{facts['bundle']}: {model['name']} ({model['variant']}), {model['parameters']:,} parameters",
        f"made by {facts['producer']}, schema {facts['schema_version']}, hashes ok",
        f"{_streams(facts)}, runs on: {targets}",
    ]
    graphs = [
        (g["name"], g["tokens"], g["stride"], _spans(g["offsets"]), sum(g["operators"].values()), _most(g["operators"]))
        for g in facts["graphs"]
    ]
    state = [(s["name"], s["role"], s["dtype"], _shape(s["shape"]), size(s["bytes"])) for s in facts["state"]]
    sections = [
        "\n".join(head),
        _quantization(facts["quantization"]),
        table(("graph", "tokens", "stride", "offsets", "nodes", "most frequent operators"), graphs),
        _memories(facts["graphs"]),
        _engines(facts),
        table(("state", "role", "dtype", "shape", "size"), state) + f"\none stream: {size(facts['state_bytes'])}",
        table(("file", "size"), [(f["name"], size(f["bytes"])) for f in facts["files"]]),
    ]
    return "\n\n".join(section for section in sections if section)


def _streams(facts: dict[str, Any]) -> str:
    """What streams consume and give."""
    if facts["input"]["kind"] == "vectors":
        return f"vectors of {facts['input']['size']} floats in, of {facts['output']['size']} out"
    return f"vocabulary {facts['vocab_size']}, tokenizer {facts['tokenizer']['kind']}"


def _quantization(entry: dict[str, Any] | None) -> str:
    """What `quantize` did, in a few lines; nothing of a bundle in float32."""
    if entry is None:
        return ""
    recipe, data, memory = entry["recipe"], entry.get("data"), entry["memory"]
    about = f" ({recipe['description']})" if recipe.get("description") else ""
    counts = ", ".join(f"{count} in {format}" for format, count in entry["formats"].items())
    lines = [f"quantised by the recipe {recipe.get('name', '?')}{about}", f"matmuls: {counts or 'none'}"]
    if kept := [name for name, format in entry["matmuls"].items() if format == "float32"]:
        lines.append(f"kept in float32: {', '.join(kept)}")
    if {"weights_bytes", "float32_weights_bytes"} <= set(entry):
        lines.append(f"weights: {size(entry['weights_bytes'])}, in float32 {size(entry['float32_weights_bytes'])}")
    rounding = "" if memory.get("dtype") == "float32" else f", rounding {memory.get('rounding')}"
    lines.append(f"memories: {memory.get('memory_dtype')}{rounding}")
    if data:
        lines.append(f"from {data.get('tokens')} tokens in {data.get('streams')} streams")
    if "max_abs_error" in entry:
        lines.append(f"largest difference from the float32 model's golden outputs: {entry['max_abs_error']:.3g}")
    return "\n".join(lines)


def _spans(offsets: list[int]) -> str:
    """Ascending numbers, those that follow each other as 0-14."""
    spans: list[list[int]] = []
    for offset in offsets:
        if spans and spans[-1][-1] + 1 == offset:
            spans[-1][1:] = [offset]
        else:
            spans.append([offset])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _engines(facts: dict[str, Any]) -> str:
    sizes = {file["name"]: file["bytes"] for file in facts["files"]}
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
        for e in facts["engines"]
    ]
    header = ("engine", "target", "compiler", "precision", "memory", "graphs", "size")
    return table(header, rows) if rows else ""


def _memories(graphs: list[dict[str, Any]]) -> str:
    """The memory nodes, those with equal attributes in one line."""
    rows: dict[tuple[str, str], int] = {}
    for graph in graphs:
        for node in graph["neural_memory"]:
            said = ", ".join(f"{name} {_value(value)}" for name, value in node["attributes"].items())
            rows[graph["name"], said] = rows.get((graph["name"], said), 0) + 1
    return table(("graph", "memory nodes", "attributes"), [(name, n, said) for (name, said), n in rows.items()])


def _most(operators: dict[str, int]) -> str:
    """The first few of counts that come sorted."""
    return ", ".join(f"{name} {count}" for name, count in list(operators.items())[:5])


def _value(value: Any) -> str:
    return _shape(value) if isinstance(value, list) else str(value)


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))
