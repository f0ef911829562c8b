"""The manifest of a bundle, typed and checked. docs/bundle.md is the contract.

Each class below is one kind of JSON object. Its fields are the object's keys, in the order in which they are written.
The annotation of a field holds the reader that checks the key's value; a default makes the key optional.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from . import strict_json
from .dtypes import DTYPES, MEMORY_DTYPES, field_words
from .errors import BundleError, MissingBundleError, NewerBundleError, OlderBundleError, os_error_fix
from .names import LONGEST_TEXT, is_plain, is_text
from .schedule import missing

FORMAT, SCHEMA_VERSION = "titans-bundle", 2
MANIFEST = "manifest.json"
LONGEST_MANIFEST = 16 << 20  # bytes, as in the runtime
GUARD_POLICIES = ("off", "raise", "freeze", "skip", "rewind", "decay", "restart")
GUARDED_KINDS = ("weights", "surprise")  # of the fields whose norms guards limit
NO_ENGINE = "none"  # the name that selects the plain graphs
_LARGEST = (1 << 31) - 1
_FIX = "copy or export the bundle again"
_SHOWN = 60  # characters of a wrong value in a message

Json = dict[str, Any]
Read = Callable[[Any, str], Any]  # a value and its key path to the checked value; raises BundleError
E = TypeVar("E", bound="Entry")
_ALWAYS = object()  # in an annotation: the key is written even if it has its default


def fail(problem: str) -> BundleError:
    """The error of an invalid manifest."""
    return BundleError("E0205", MANIFEST, problem, _FIX)


def wrong(path: str, expected: str, value: Any) -> BundleError:
    """The error of a key with a value of the wrong type or out of range."""
    shown = json.dumps(value, default=repr)
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return fail(f"{path or 'document'}: expected {expected}, got {shown}")


def missing_field(path: str) -> BundleError:
    """The error of a required key that is absent."""
    return fail(f"missing field {path}")


def string(value: Any, path: str) -> str:
    """A text without hidden characters."""
    if not isinstance(value, str) or not is_text(value):
        raise wrong(path, "a text without hidden characters", value)
    if len(value.encode()) > LONGEST_TEXT:
        raise wrong(path, f"a text of at most {LONGEST_TEXT} bytes", value)
    return value


def plain_name(value: Any, path: str) -> str:
    """A name that may become a part of a path or a word of a script."""
    if not isinstance(value, str) or not is_plain(value):
        raise wrong(path, "a plain name", value)
    return value


def file_name(value: Any, path: str) -> str:
    """The name of a file in the bundle's folder itself."""
    if not isinstance(value, str) or not is_plain(value):
        raise wrong(path, "a plain file name", value)
    return value


def word(*known: str) -> Read:
    """One of the given words."""

    def read(value: Any, path: str) -> str:
        if not isinstance(value, str) or value not in known:
            names = [json.dumps(name) for name in known]
            raise wrong(path, " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}", value)
        return value

    return read


def integer(least: int, most: int = (1 << 63) - 1) -> Read:
    """An integer of a range."""

    def read(value: Any, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            limit = f" to {most}" if most < (1 << 63) - 1 else ""
            raise wrong(path, f"an integer from {least}{limit}", value)
        return value

    return read


def number(value: Any, path: str) -> float:
    """A finite number from 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise wrong(path, "a finite number from 0", value)
    return value


def positive(value: Any, path: str) -> float:
    """A finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise wrong(path, "a finite number above 0", value)
    return value


def array(item: Read) -> Read:
    """A list of such values, as a tuple."""

    def read(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise wrong(path, "an array", value)
        return tuple(item(one, f"{path}[{index}]") for index, one in enumerate(value))

    return read


def mapping(item: Read) -> Read:
    """An object with such values under any keys."""

    def read(value: Any, path: str) -> Json:
        return {key: item(one, f"{path}.{key}") for key, one in object_of(value, path).items()}

    return read


def object_of(value: Any, path: str) -> Json:
    """Any object."""
    if not isinstance(value, dict):
        raise wrong(path, "an object", value)
    return value


def nullable(item: Read, default: Any = None) -> Read:
    """Such a value, or `default` for null."""
    return lambda value, path: default if value is None else item(value, path)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An object of the manifest. `extra` holds the keys that this version does not know; they are written back."""

    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls: type[E], value: Any, path: str = "") -> E:
        """The object at the key path `path`. Raises BundleError with the path of the first wrong key."""
        given = object_of(value, path)
        found: Json = {}
        for name, (read, required, _) in _schema(cls).items():
            where = f"{path}.{name}" if path else name
            if name in given:
                found[name] = read(given[name], where)
            elif required:
                raise missing_field(where)
        entry = cls(**found, extra={key: one for key, one in given.items() if key not in _schema(cls)})
        entry.check(path)
        return entry

    def check(self, path: str) -> None:
        """Raises BundleError where keys contradict each other."""

    def to_json(self) -> Json:
        """The object as JSON has it. Optional keys with their default are left out."""
        defaults = {one.name: one.default for one in fields(self)}
        found = {
            name: plain(value)
            for name, (_, _, always) in _schema(type(self)).items()
            if (value := getattr(self, name)) != defaults[name] or always
        }
        return {**found, **self.extra}


_schemas: dict[type[Entry], dict[str, tuple[Read, bool, bool]]] = {}


def _schema(cls: type[Entry]) -> dict[str, tuple[Read, bool, bool]]:
    """By key: its reader, whether it is required, whether it is always written."""
    if cls not in _schemas:
        hints = get_type_hints(cls, include_extras=True)
        found = _schemas[cls] = {}
        for one in fields(cls):
            if one.name != "extra":
                read, *more = hints[one.name].__metadata__
                found[one.name] = read, one.default is MISSING, _ALWAYS in more
    return _schemas[cls]


def plain(value: Any) -> Any:
    """Entries, tuples and mappings as JSON has them."""
    if isinstance(value, Entry):
        return value.to_json()
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return value


Shape = Annotated[tuple[int, ...], array(integer(1))]
Text = Annotated[str, string]
Name = Annotated[str, plain_name]
OptionalText = Annotated[str | None, nullable(string)]
FileName = Annotated[str, file_name]
Count = Annotated[int, integer(1, _LARGEST)]


@dataclass(frozen=True, kw_only=True)
class FileReference(Entry):
    """A file of the bundle."""

    file: FileName


@dataclass(frozen=True, kw_only=True)
class FileRecord(Entry):
    """Size in bytes and XXH3-128 hash, 32 hexadecimal digits, of a file."""

    bytes: Annotated[int, integer(0)]
    xxh3_128: Text


@dataclass(frozen=True, kw_only=True)
class Source(Entry):
    """The checkpoint that a model was exported from.

    weights_sha256: of its weights. weights: the state dict that was read, where the checkpoint has several. dtypes: of
    the saved tensors, unless all are float32. library_defaults: arguments that the library's defaults filled in.
    """

    format: OptionalText = None
    weights_sha256: OptionalText = None
    weights: OptionalText = None
    dtypes: Annotated[tuple[str, ...], array(string)] = ("float32",)
    library_defaults: Annotated[Mapping[str, Any] | None, nullable(object_of)] = None


@dataclass(frozen=True, kw_only=True)
class Model(Entry):
    """The exported model. parameters: their number; config: the checkpoint's configuration."""

    name: Text
    variant: Name
    parameters: Annotated[int, integer(0)]
    config: Annotated[Mapping[str, Any] | None, object_of] = None
    source: Annotated[Source | None, nullable(Source.from_json)] = None

    @property
    def weights_sha256(self) -> str | None:
        """The hash of the checkpoint's weights."""
        return self.source.weights_sha256 if self.source else None

    @property
    def checkpoint_format(self) -> str:
        """The format of the checkpoint."""
        return (self.source.format if self.source else None) or "titans"


@dataclass(frozen=True, kw_only=True)
class Input(Entry):
    """The graph input that streams consume: int64 token ids (1, T), or float32 vectors (1, T, size)."""

    kind: Annotated[str, word("tokens", "vectors")]
    name: Name
    dtype: Text
    vocab_size: Annotated[int | None, integer(1, _LARGEST)] = None  # of tokens
    size: Annotated[int | None, integer(1, _LARGEST)] = None  # of vectors

    def check(self, path: str) -> None:
        """Compares dtype and size with the kind."""
        key, dtype = ("vocab_size", "int64") if self.kind == "tokens" else ("size", "float32")
        word(dtype)(self.dtype, f"{path}.dtype")
        if getattr(self, key) is None:
            raise missing_field(f"{path}.{key}")

    @property
    def width(self) -> int:
        """The vocabulary's size, or the floats of a vector."""
        found = self.vocab_size if self.kind == "tokens" else self.size
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True)
class Output(Entry):
    """The graph output: float32 logits or vectors (1, T, size), row t after token or vector t."""

    kind: Annotated[str, word("logits", "vectors")]
    name: Name
    dtype: Annotated[str, word("float32")]
    size: Count


@dataclass(frozen=True, kw_only=True)
class Controls(Entry):
    """Names of the graph inputs position, int64 (B,), and learn, bool (B,), of a call of B streams.

    Graphs with the input slots, int64 (B,), take any number of streams, whose state lies in pools. They may have the
    input valid, int64 (B,), the number of tokens of each stream that count. All other graphs take one stream.
    """

    position: Name
    learn: Name
    valid: Annotated[str | None, plain_name] = None
    slots: Annotated[str | None, plain_name] = None

    @property
    def names(self) -> list[str]:
        """The names of the inputs that the graphs have."""
        return [name for name in (self.position, self.learn, self.valid, self.slots) if name is not None]

    def check(self, path: str) -> None:
        """Compares the names with each other."""
        if self.valid is not None and self.slots is None:
            raise wrong(f"{path}.valid", "no name, as there are no slots", self.valid)


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Entry):
    """How text becomes tokens. kind: bytes, file or none; later versions may have others."""

    kind: Name
    file: Annotated[str | None, file_name] = None

    def check(self, path: str) -> None:
        """Compares the file with the kind."""
        if self.kind == "file" and self.file is None:
            raise missing_field(f"{path}.file")


@dataclass(frozen=True, kw_only=True)
class LayoutField(Entry):
    """A field of a packed memory row: `shape` elements from the 32-bit word `offset` of the last dimension on.

    kind: what it holds (row_fields.WRITTEN has the kinds). written: by every token, by the i-th token of a chunk its
    row i, or by the token that completes a chunk. of: the field whose rounding error it holds. at_start: its values at
    a chunk's start.
    """

    name: Name
    offset: Annotated[int, integer(0)]
    shape: Shape
    dtype: Annotated[str, word(*MEMORY_DTYPES)] = "float32"
    kind: Annotated[str | None, plain_name] = None
    written: Annotated[str, word("token", "row", "chunk")] = "token"
    of: Annotated[str | None, plain_name] = None
    at_start: Annotated[int | None, integer(0, 1)] = None

    @property
    def words(self) -> int:
        """32-bit words of the field."""
        return field_words(self.shape, self.dtype)


@dataclass(frozen=True, kw_only=True)
class WrittenRows(Entry):
    """The rows of a cache that a row of the stream writes: first[i] + row % period along `axis`."""

    axis: Annotated[int, integer(0)]
    first: Annotated[tuple[int, ...], array(integer(0))]
    period: Count


@dataclass(frozen=True, kw_only=True)
class StreamRows(Entry):
    """Rows of a stream: one for each token, and `longterm` more after every `segment` tokens."""

    segment: Count
    longterm: Annotated[int, integer(0, _LARGEST)]


@dataclass(frozen=True, kw_only=True)
class StateTensor(Entry):
    """A tensor that a stream carries from call to call, of shape (1, ...) for one stream.

    input, output: the graph input that takes it and the graph output with its successor. role: memory, conv or cache.
    operator: the operator that updates a memory.
    """

    name: Name
    input: Name
    output: Name
    dtype: Annotated[str, word(*DTYPES)]
    shape: Shape
    role: Name
    layout: Annotated[tuple[LayoutField, ...], array(LayoutField.from_json)] = ()
    written: Annotated[WrittenRows | None, WrittenRows.from_json] = None
    chunk: Annotated[int | None, integer(1, _LARGEST)] = None
    rows: Annotated[StreamRows | None, StreamRows.from_json] = None
    operator: Annotated[str | None, plain_name] = None

    def check(self, path: str) -> None:
        """Compares the keys with the shape and the role."""
        if not self.shape or self.shape[0] != 1:
            raise wrong(f"{path}.shape", "[1, ...] for one stream", plain(self.shape))
        if self.role == "memory":
            word("float32")(self.dtype, f"{path}.dtype")
        elif self.chunk is not None:
            raise wrong(f"{path}.chunk", 'no such key unless role is "memory"', self.chunk)
        check_layout(self.layout, self.shape, path)
        if self.written is not None:
            self._check_written(self.written, f"{path}.written")

    def _check_written(self, written: WrittenRows, path: str) -> None:
        integer(0, len(self.shape) - 1)(written.axis, f"{path}.axis")
        rows, least = self.shape[written.axis], 0
        integer(1, rows)(written.period, f"{path}.period")
        for index, first in enumerate(written.first):
            integer(least, rows - written.period)(first, f"{path}.first[{index}]")
            least = first + written.period


def check_layout(layout: Iterable[LayoutField], shape: tuple[int, ...], path: str) -> None:
    """Raises BundleError for a field that is longer than a row of a tensor of that shape."""
    for index, one in enumerate(layout):
        if one.offset + one.words > shape[-1]:
            raise fail(f"{path}.layout[{index}]: {one.words} words from {one.offset} exceed a row of {shape[-1]}")


@dataclass(frozen=True, kw_only=True)
class GraphEntry(Entry):
    """A graph: it consumes `tokens` tokens and may start where position % stride is one of `offsets`.

    weights: its initialisers that lie in the bundle's weights file.
    """

    name: Name
    file: FileName
    tokens: Count
    stride: Count
    offsets: Annotated[tuple[int, ...], array(integer(0))] = (0,)
    weights: Annotated[tuple[str, ...], array(string)]

    def check(self, path: str) -> None:
        """Checks the order of the offsets."""
        if not self.offsets:
            raise wrong(f"{path}.offsets", "at least one offset", [])
        for index, (before, offset) in enumerate(zip((-1, *self.offsets), self.offsets, strict=False)):
            if not before < offset < self.stride:
                raise wrong(f"{path}.offsets[{index}]", f"ascending offsets below the stride of {self.stride}", offset)


@dataclass(frozen=True, kw_only=True)
class GoldenSample(Entry):
    """Names of the tensors that describe outputs too wide to keep whole. seed: of the sketches."""

    columns: Name
    sketches: Name
    log_sum_exp: Annotated[str | None, plain_name] = None
    seed: Annotated[int, integer(0)]


@dataclass(frozen=True, kw_only=True)
class Golden(Entry):
    """Tensors of known inputs and of their outputs in `file`, and the absolute tolerance of the outputs.

    tokens, logits: their names in a bundle that takes tokens; vectors, outputs: in one that takes vectors. positions:
    the name of the positions with golden outputs; all by default. sample: None if outputs are whole.
    """

    file: FileName
    tokens: Annotated[str | None, plain_name] = None
    logits: Annotated[str | None, plain_name] = None
    vectors: Annotated[str | None, plain_name] = None
    outputs: Annotated[str | None, plain_name] = None
    positions: Annotated[str | None, plain_name] = None
    sample: Annotated[GoldenSample | None, nullable(GoldenSample.from_json)] = None
    tolerance: Annotated[float, number]


@dataclass(frozen=True, kw_only=True)
class Limit(Entry):
    """The largest error of outputs from position `start` on; None if rounding can make any error."""

    start: Annotated[int, integer(0)]
    limit: Annotated[float | None, nullable(number)]


@dataclass(frozen=True, kw_only=True)
class Stability(Entry):
    """How a model amplifies rounding errors, measured over the first `positions` tokens of the golden stream.

    horizon: tokens over which outputs are within the golden tolerance. doubling: tokens in which a difference doubles,
    None if it jumps. limits: ascending, from position 0.
    """

    horizon: Annotated[int, integer(0)]
    doubling: Annotated[float | None, nullable(number)]
    positions: Annotated[int, integer(1)]
    limits: Annotated[tuple[Limit, ...], array(Limit.from_json)]

    def check(self, path: str) -> None:
        """Compares the keys with each other."""
        if self.horizon > self.positions:
            raise wrong(f"{path}.horizon", f"an integer from 0 to {self.positions}", self.horizon)
        if not self.limits or self.limits[0].start:
            raise wrong(f"{path}.limits", "limits from position 0", plain(self.limits))
        for index, (one, other) in enumerate(pairwise(self.limits)):
            rises = one.limit is not None and (other.limit is None or other.limit > one.limit)
            if other.start <= one.start or not rises:
                raise wrong(f"{path}.limits[{index + 1}]", "an ascending limit at a later position", plain(other))


@dataclass(frozen=True, kw_only=True)
class CalibrationData(Entry):
    """The data that a recipe was calibrated with: hash, tokens and streams."""

    xxh3_128: Text
    tokens: Annotated[int, integer(0)]
    streams: Annotated[int, integer(0)]


@dataclass(frozen=True, kw_only=True)
class MemoryFormat(Entry):
    """How memories are kept between calls. seed: of stochastic rounding."""

    dtype: Annotated[str, word(*MEMORY_DTYPES), _ALWAYS] = "float32"
    rounding: Annotated[str, plain_name, _ALWAYS] = "nearest"
    seed: Annotated[int, integer(0), _ALWAYS] = 0


@dataclass(frozen=True, kw_only=True)
class Quantization(Entry):
    """What `titans-export quantize` did. matmuls: the format of each matmul's weight."""

    recipe: Annotated[Mapping[str, Any], object_of]
    data: Annotated[CalibrationData | None, nullable(CalibrationData.from_json), _ALWAYS] = None
    seed: Annotated[int | None, nullable(integer(0)), _ALWAYS] = None
    matmuls: Annotated[Mapping[str, str], mapping(string)]
    memory: Annotated[MemoryFormat, MemoryFormat.from_json]
    weights_bytes: Annotated[int | None, integer(0)] = None
    float32_weights_bytes: Annotated[int | None, integer(0)] = None
    max_abs_error: Annotated[float | None, number] = None


@dataclass(frozen=True, kw_only=True)
class GuardField(Entry):
    """The norm of a memory field over all its elements. seen: the largest of all heads; limit: of a healthy memory."""

    seen: Annotated[float | None, number] = None
    limit: Annotated[float | None, positive] = None


@dataclass(frozen=True, kw_only=True)
class Guard(Entry):
    """What the bundle gives its streams: norms for their health, and a guard.

    fields: by the field's name, such as layers.0.memory.W0. restart_every: tokens, 0 for never. data, margin: what the
    limits were found from, and their ratio to the norms seen.
    """

    policy: Annotated[str, word(*GUARD_POLICIES)] = "off"
    restart_every: Annotated[int, integer(0)] = 0
    data: Annotated[CalibrationData | None, nullable(CalibrationData.from_json)] = None
    margin: Annotated[float | None, nullable(positive)] = None
    fields: Annotated[Mapping[str, GuardField], mapping(GuardField.from_json)]

    @property
    def limits(self) -> dict[str, float]:
        """The limits, by the field's name."""
        return {name: one.limit for name, one in self.fields.items() if one.limit is not None}


@dataclass(frozen=True, kw_only=True)
class Plugin(Entry):
    """The plugin that an engine calls for the memory."""

    name: Name
    namespace: Name
    version: Name


@dataclass(frozen=True, kw_only=True)
class EngineGraph(Entry):
    """A compiled graph. weights: initialisers that the runtime hands over."""

    graph: Name
    file: FileName
    weights: Annotated[tuple[str, ...] | None, nullable(array(string))] = None


@dataclass(frozen=True, kw_only=True)
class EngineEntry(Entry):
    """The graphs compiled for a kind of device. weights: a file with weights of the engine's own."""

    name: Name
    target: Name
    compiler: Name
    compiler_version: Name
    precision: Name
    device: Name
    sm: Annotated[tuple[int, ...], nullable(array(integer(1, 999)), ())]
    platform: Name
    cuda: Annotated[str | None, nullable(plain_name), _ALWAYS] = None
    driver: Annotated[int | None, nullable(integer(1, _LARGEST)), _ALWAYS] = None
    memory: Name
    plugin: Annotated[Plugin | None, nullable(Plugin.from_json), _ALWAYS] = None
    alias: Annotated[str | None, nullable(plain_name), _ALWAYS] = None
    state_in_place: Annotated[tuple[str, ...], nullable(array(plain_name), ()), _ALWAYS] = ()
    graphs: Annotated[tuple[EngineGraph, ...], array(EngineGraph.from_json)]
    weights: Annotated[FileReference | None, nullable(FileReference.from_json)] = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the engine's own files."""
        own = (self.weights.file,) if self.weights else ()
        return (*(graph.file for graph in self.graphs), *own)

    def check(self, path: str) -> None:
        """Compares the keys with each other as the runtime does."""
        if self.name in ("", NO_ENGINE):
            raise wrong(f"{path}.name", f"a name other than {NO_ENGINE}", self.name)
        if self.device == "cuda" and not self.sm:
            raise wrong(f"{path}.sm", "the compute capabilities of a cuda engine", [])
        if (self.plugin is not None) != (self.memory == "plugin"):
            raise wrong(f"{path}.memory", '"plugin" if and only if the engine has a plugin', self.memory)
        if self.state_in_place and (self.plugin is None or self.alias in (None, "two-buffers")):
            raise wrong(
                f"{path}.state_in_place", "[] without a plugin that updates in place", plain(self.state_in_place)
            )


@dataclass(frozen=True, kw_only=True)
class Manifest(Entry):
    """The manifest of a bundle."""

    format: Annotated[str, word(FORMAT), _ALWAYS] = FORMAT
    schema_version: Annotated[int, integer(SCHEMA_VERSION, SCHEMA_VERSION), _ALWAYS] = SCHEMA_VERSION
    producer: Text
    model: Annotated[Model, Model.from_json]
    input: Annotated[Input, Input.from_json]
    output: Annotated[Output, Output.from_json]
    controls: Annotated[Controls, Controls.from_json]
    tokenizer: Annotated[Tokenizer, Tokenizer.from_json]
    state: Annotated[tuple[StateTensor, ...], array(StateTensor.from_json)]
    graphs: Annotated[tuple[GraphEntry, ...], array(GraphEntry.from_json)]
    golden: Annotated[Golden, Golden.from_json]
    weights: Annotated[FileReference, FileReference.from_json]
    initial_state: Annotated[FileReference, FileReference.from_json]
    files: Annotated[Mapping[str, FileRecord], mapping(FileRecord.from_json)]
    stability: Annotated[Stability | None, nullable(Stability.from_json)] = None
    quantization: Annotated[Quantization | None, nullable(Quantization.from_json)] = None
    guard: Annotated[Guard | None, nullable(Guard.from_json)] = None
    engines: Annotated[tuple[EngineEntry, ...], array(EngineEntry.from_json)] = ()

    @property
    def raw(self) -> Json:
        """The manifest as JSON has it."""
        return self.to_json()

    @property
    def memory(self) -> MemoryFormat:
        """How memories are kept between calls."""
        return self.quantization.memory if self.quantization else MemoryFormat()

    @property
    def guarded_fields(self) -> tuple[str, ...]:
        """The names of the memory fields whose norms guards limit."""
        names: list[str] = []
        for entry in self.state:
            if entry.role == "memory":
                known = (f"{entry.name}.{one.name}" for one in entry.layout if one.kind in GUARDED_KINDS)
                names += known if entry.layout else (entry.name,)
        return tuple(names)

    def graph(self, name: str) -> GraphEntry:
        """The graph of that name. Raises KeyError."""
        return _named(self.graphs, name)

    def engine(self, name: str) -> EngineEntry:
        """The engine of that name. Raises KeyError."""
        return _named(self.engines, name)

    def with_engine(self, engine: EngineEntry, files: Mapping[str, FileRecord]) -> tuple[Manifest, set[str]]:
        """The manifest with the engine, whose files are `files`, and the names of the files that it replaces."""
        dropped = {file for other in self.engines if other.name == engine.name for file in other.files}
        kept = {name: record for name, record in self.files.items() if name not in dropped}
        others = tuple(other for other in self.engines if other.name != engine.name)
        listed = dict(sorted({**kept, **files}.items()))
        return replace(self, engines=(*others, engine), files=listed), dropped

    def text(self) -> str:
        """The manifest's text, which depends on the manifest alone."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Writes the manifest into the folder."""
        (folder / MANIFEST).write_text(self.text(), encoding="utf-8")

    def check(self, path: str) -> None:
        """Compares the objects with each other."""
        self._check_kinds()
        if problem := missing(self.graphs):
            raise wrong("graphs", problem, [graph.name for graph in self.graphs])
        self._check_names()
        self._check_guard()
        self._check_engines()
        self._check_files()

    def _check_kinds(self) -> None:
        kind, result, pair = ("logits", self.output, ("tokens", "logits"))
        if self.input.kind == "vectors":
            kind, pair = "vectors", ("vectors", "outputs")
            word("none")(self.tokenizer.kind, "tokenizer.kind")
        word(kind)(result.kind, "output.kind")
        if self.input.kind == "tokens":
            integer(self.input.width, self.input.width)(result.size, "output.size")
        for key in pair:
            if getattr(self.golden, key) is None:
                raise missing_field(f"golden.{key}")

    def _check_names(self) -> None:
        """Checks that each name that a graph binds has one meaning."""
        inputs = [self.input.name, *self.controls.names]
        inputs += [entry.input for entry in self.state]
        outputs = [self.output.name, *(entry.output for entry in self.state)]
        fields_ = [f"{entry.name}.{one.name}" for entry in self.state for one in entry.layout]
        tensors = [entry.name for entry in self.state]
        for where, names in (
            ("graph input", inputs),
            ("graph output", outputs),
            ("state tensor", tensors),
            ("memory field", [*fields_, *(entry.name for entry in self.state if not entry.layout)]),
            ("graph input and output", [*set(inputs), *set(outputs)]),
            ("graph", [graph.name for graph in self.graphs]),
        ):
            if name := _twice(names):
                raise fail(f"two uses of the {where} name {name}")

    def _check_guard(self) -> None:
        for name in self.guard.fields if self.guard else ():
            if name not in self.guarded_fields:
                raise wrong(f"guard.fields.{name}", "the name of a memory's weights or surprise as key", name)

    def _check_engines(self) -> None:
        if name := _twice(engine.name for engine in self.engines):
            raise fail(f"engines: two are named {name}")
        graphs, tensors = {graph.name: graph for graph in self.graphs}, {entry.name for entry in self.state}
        for index, engine in enumerate(self.engines):
            path = f"engines[{index}]"
            for at, own in enumerate(engine.graphs):
                word(*graphs)(own.graph, f"{path}.graphs[{at}].graph")
            if name := _twice(own.graph for own in engine.graphs):
                raise fail(f"{path}.graphs: two are named {name}")
            if problem := missing([graphs[own.graph] for own in engine.graphs]):
                raise wrong(f"{path}.graphs", problem, [own.graph for own in engine.graphs])
            for at, name in enumerate(engine.state_in_place):
                if name not in tensors:
                    raise wrong(f"{path}.state_in_place[{at}]", "the name of a state tensor", name)

    def _check_files(self) -> None:
        for name in self.files:
            file_name(name, "a key of files")
        listed = {f"graphs[{at}].file": graph.file for at, graph in enumerate(self.graphs)}
        listed |= {
            "golden.file": self.golden.file,
            "weights.file": self.weights.file,
            "initial_state.file": self.initial_state.file,
        }
        if self.tokenizer.kind == "file" and self.tokenizer.file is not None:
            listed["tokenizer.file"] = self.tokenizer.file
        for index, engine in enumerate(self.engines):
            listed |= {f"engines[{index}].graphs[{at}].file": own.file for at, own in enumerate(engine.graphs)}
            if engine.weights:
                listed[f"engines[{index}].weights.file"] = engine.weights.file
        for path, name in listed.items():
            if name not in self.files:
                raise fail(f"{path}: {name} is not listed in files")


N = TypeVar("N", GraphEntry, EngineEntry)


def _named(entries: Iterable[N], name: str) -> N:
    for entry in entries:
        if entry.name == name:
            return entry
    raise KeyError(name)


def _twice(names: Iterable[str]) -> str | None:
    """The first name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in a folder. Raises BundleError."""
    file = folder / MANIFEST
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise BundleError("E0206", "bundle", f"{file} is not a regular file", _FIX)
    try:
        if (size := file.stat().st_size) > LONGEST_MANIFEST:
            raise fail(f"expected at most {LONGEST_MANIFEST} bytes, got {size}")
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{folder} has no {MANIFEST}" if folder.exists() else f"{folder} does not exist"
        raise MissingBundleError("E0201", "bundle", problem, "give the path of a NAME.titans folder") from None
    except UnicodeDecodeError as error:
        raise fail(f"expected UTF-8: {error}") from None
    except OSError as error:
        raise BundleError("E1001", "bundle", f"{file} cannot be read: {error.strerror}", os_error_fix(error)) from None
    return parse_manifest(text, folder)


def parse_manifest(text: str, folder: Path | None = None) -> Manifest:
    """The manifest in a JSON text. `folder` is the bundle's, for messages. Raises BundleError."""
    try:
        values = strict_json.loads(text)
    except json.JSONDecodeError as error:
        raise fail(f"expected a JSON object, got text that is not JSON: {error}") from None
    except ValueError as error:
        raise fail(str(error)) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        problem = f'{folder or "the text"} is not a bundle: its manifest has no "format": "{FORMAT}"'
        raise BundleError("E0201", "bundle", problem, "give the path of a NAME.titans folder")
    version = integer(1)(values.get("schema_version"), "schema_version")
    if version > SCHEMA_VERSION:
        problem = f"bundle of a newer schema: expected schema_version {SCHEMA_VERSION}, got {version}"
        raise NewerBundleError("E0202", MANIFEST, problem, "install a newer titans-export")
    if version < SCHEMA_VERSION:
        problem = f"bundle of an older schema: expected schema_version {SCHEMA_VERSION}, got {version}"
        fix = f"export the checkpoint again: titans-export export CHECKPOINT -o {folder or 'NAME.titans'}"
        raise OlderBundleError("E0203", MANIFEST, problem, fix)
    return Manifest.from_json(values)
