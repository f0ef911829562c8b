"""The fields of a packed row: what each holds and when it is written. Guards, rollback and tools use these alone."""

from __future__ import annotations

from typing import NamedTuple

from .errors import BundleError
from .manifest import LayoutField

# Kind -> when a field of that kind is written. "chunk": by the token that completes a chunk. "token": by every token.
# "row": row i by the i-th token of a chunk, and nothing reads the row before.
WRITTEN = {
    "weights": "chunk",
    "gradient_point": "chunk",
    "surprise": "chunk",
    "higher_surprise": "chunk",
    "rounding_error": "chunk",
    "update_count": "chunk",
    "open_chunk": "row",
    "coefficient": "token",
}
# The kinds that a memory dtype concerns.
STORED_KINDS = ("weights", "gradient_point", "surprise")


class RowField(NamedTuple):
    """A field of a packed row.

    kind: a key of WRITTEN. of: the field whose rounding error this one holds. at_start: the values of a coefficient at
    a chunk's start.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    of: str | None = None
    at_start: int | None = None

    def at(self, offset: int, dtype: str = "float32") -> LayoutField:
        """The field at `offset`, in 32-bit words, of a row."""
        return LayoutField(
            name=self.name,
            offset=offset,
            shape=self.shape,
            dtype=dtype,
            kind=self.kind,
            written=WRITTEN[self.kind],
            of=self.of,
            at_start=self.at_start,
        )

    @classmethod
    def from_layout(cls, field: LayoutField) -> RowField:
        """The field without its place. Raises BundleError for a kind that no operator has."""
        if field.kind not in WRITTEN:
            problem = f"field of unknown kind: {field.name} is {field.kind}"
            raise BundleError("E0205", "manifest.json", problem, "export the checkpoint again")
        return cls(field.name, field.shape, field.kind, field.of, field.at_start)


def rounding_error_of(field: RowField) -> RowField:
    """The field that keeps what rounding took from `field`."""
    name = f"EW_{field.name}" if field.name == "gamma" else f"E{field.name}"
    return RowField(name, field.shape, "rounding_error", field.name)
