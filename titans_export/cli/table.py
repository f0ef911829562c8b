"""Plain text tables, sizes and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..names import shown


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A text table with columns as wide as their cells; numbers are right-aligned. Hidden characters become escapes."""
    cells = [list(header), *([shown(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def size(count: int) -> str:
    """A readable number of bytes: 999 B, 1.5 KiB, 20.0 MiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def number(value: float | None) -> str:
    """A small number, or - for None."""
    return "-" if value is None else f"{value:.2e}"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell == "-"
