"""The output of `titans-export inspect` for a state file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MismatchError
from ..files import check_file
from .command import emit, say
from .table import size, table

if TYPE_CHECKING:
    from ..states import MemoryInfo, NotFinite, SavedState


def inspect_state(path: Path, bundle: Path | None, numpy: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Prints the state and exports its memory if asked to. Raises MismatchError if it holds NaN or infinity."""
    from ..states import describe_memories, find_not_finite, fresh_memory, open_state, read_key, write_npz

    check_file(numpy)
    state = open_state(path, None if key_file is None else read_key(key_file))
    broken = find_not_finite(state)
    memories = describe_memories(state, None if bundle is None else fresh_memory(bundle, state))
    if numpy is not None:
        write_npz(state, numpy)
    if as_json:
        emit(_as_json(state, broken, memories, bundle, numpy))
    else:
        say(_text(state, broken, memories))
    if broken:
        more = f", and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise MismatchError(
            "E0904",
            "inspect",
            f"{path} is not finite: {_broken(broken[0])}{more}",
            "go back to an earlier state, and set a guard (docs/guard.md)",
        )


def _as_json(
    state: SavedState, broken: list[NotFinite], memories: list[MemoryInfo], bundle: Path | None, numpy: Path | None
) -> dict[str, Any]:
    metadata = state.metadata
    return {
        "state": str(state.path),
        "finite": not broken,
        "not_finite": [dataclasses.asdict(entry) for entry in broken],
        "bytes": state.bytes,
        "encrypted": state.encrypted,
        "hash": "ok",
        **{key: metadata.get(key) for key in ("schema_version", "producer", "created", "model", "backend", "device")},
        "position": state.position,
        "learning": state.learning,
        "memory_dtype": metadata.get("memory"),
        "tensors": [
            {
                "name": entry.name,
                "role": entry.role,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "bytes": _bytes(state, entry.name),
            }
            for entry in state.entries
        ],
        "memories": [dataclasses.asdict(entry) for entry in memories],
        "bundle": None if bundle is None else str(bundle),
        "numpy": None if numpy is None else str(numpy),
    }


def _bytes(state: SavedState, name: str) -> int:
    return int(state.tensors[name].nbytes)


def _text(state: SavedState, broken: list[NotFinite], memories: list[MemoryInfo]) -> str:
    model, metadata = state.model, state.metadata
    memory_dtype = metadata.get("memory") or {}
    rounding = "" if memory_dtype.get("dtype") == "float32" else f", rounding {memory_dtype.get('rounding')}"
    sealed = "decrypted, " if state.encrypted else ""
    head = [
        *(f"NOT FINITE: {_broken(entry)}" for entry in broken),
        f"{state.path}: {model.get('name')} ({model.get('variant')}), position {state.position:,}, "
        + ("learning" if state.learning else "frozen"),
        f"made by {metadata.get('producer')} at {metadata.get('created')}, "
        f"{metadata.get('backend')} on {metadata.get('device')}",
        f"{size(state.bytes)}, {sealed}hash ok, weights {str(model.get('weights_sha256'))[:12]}, "
        f"memory dtype {memory_dtype.get('dtype')}{rounding}",
    ]
    roles: dict[str, list[int]] = {}
    for entry in state.entries:
        roles.setdefault(entry.role, []).append(_bytes(state, entry.name))
    rows = [(role, len(counts), size(sum(counts))) for role, counts in roles.items()]
    sections = ["\n".join(head), _memories(memories), table(("state", "tensors", "size"), rows)]
    return "\n\n".join(section for section in sections if section)


def _memories(memories: list[MemoryInfo]) -> str:
    if not memories:
        return ""
    fresh = any(entry.from_fresh is not None for entry in memories)
    blocks = any(entry.saturation.dead_blocks is not None for entry in memories)
    header = ["memory", "|W|", "largest head", "|S|", "largest head", "|S|/|W|", "open chunk"]
    header += ["|W - F|"] * fresh + ["at limit", "zero"] + ["dead blocks"] * blocks
    rows = []
    for entry in memories:
        weights, surprise, used = entry.weights, entry.surprise, entry.saturation
        row = [entry.name, _number(weights.norm), _head(weights.head_norms, weights.largest_head)]
        if surprise is None:
            row += ["-", "-"]
        else:
            row += [_number(surprise.norm), _head(surprise.head_norms, surprise.largest_head)]
        row += [_largest(entry.step), _largest(entry.open_chunk)]
        if fresh:
            initial = entry.fresh_weights
            row.append("-" if initial is None else f"{_number(entry.from_fresh or 0)} (|F| {_number(initial.norm)})")
        row += [_part(used.at_limit), _part(used.zero)]
        rows.append(row + [_part(used.dead_blocks)] * blocks)
    return table(header, rows)


def _head(norms: list[float], head: int) -> str:
    return f"{_number(norms[head])} (head {head} of {len(norms)})"


def _largest(parts: list[float] | None) -> str:
    if parts is None:
        return "-"
    head = max(range(len(parts)), key=parts.__getitem__)
    return f"{_part(parts[head])} (head {head})"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _part(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _broken(entry: NotFinite) -> str:
    counts = [f"{n} {kind}" for n, kind in ((entry.nan, "NaN"), (entry.infinite, "infinite")) if n]
    heads = "" if not entry.heads else f", head{'s' * (len(entry.heads) > 1)} {', '.join(map(str, entry.heads))}"
    return f"{' and '.join(counts)} in {entry.name}{heads}"
