"""Exports a checkpoint to a bundle, and verifies that the bundle reproduces PyTorch's outputs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from . import __version__, hub
from . import manifest as records
from .bundle import MANIFEST, STATE, TOKENIZER, WEIGHTS, file_record
from .call_check import check_calls
from .checkpoints import Checkpoint, LoadOptions, load_checkpoint
from .errors import MismatchError, UsageError
from .files import check_output, replacing_folder
from .golden import Golden, GoldenBuilder, least_positions, periods_of, sample_inputs, usual_positions, write_golden
from .guarding import seen_norms, seen_record
from .model import Graph, StreamModel
from .model.float64 import Float64
from .model.rounding import unrounded
from .onnx.graphs import LEARN, NEXT, POSITION, SLOTS_INPUT, trace_graph
from .onnx.parameters import map_parameters, return_free_memory
from .onnx.weights import share_weights
from .output_limits import Floats, OutputLimits, first_beyond
from .progress import Advance, Bar, no_bar
from .reference import TOLERANCE, run_outputs
from .row_file import RowFile, Rows, row_file
from .safetensors_file import write_safetensors
from .schedule import covering_cuts
from .stability import RunningError, explained_limits, library_error_of, model_error, stable_limits
from .text.vocabulary import check_vocabulary

NORM_READS = 16  # most reads of the memory for its norms


@dataclass(frozen=True)
class ExportReport:
    """The result of an export. Errors are the largest absolute differences of outputs over `positions` tokens.

    library_error: float64 PyTorch against the checkpoint's own library, over at most ORACLE_POSITIONS; None if there is
    no such library or it is not installed. stability: None if float32 follows the model over all positions; else
    tolerance applies within the horizon. source: what was read of the checkpoint, as `Origin.to_json` describes it.
    """

    bundle: str
    variant: str
    parameters: int
    graphs: list[str]
    weights_bytes: int
    state_bytes: int
    positions: int
    max_abs_error: float
    pytorch_float32_error: float
    library_error: float | None
    tolerance: float
    stability: records.Stability | None
    seconds: float
    source: dict[str, Any]


def _state_tensors(model: StreamModel) -> list[records.StateTensor]:
    found = []
    facts = model.state_info()
    for name, initial in model.initial_state(1).items():
        given = facts[name]
        entry = records.StateTensor(
            name=name,
            input=name,
            output=name + NEXT,
            dtype="float32",
            shape=tuple(initial.shape),
            role=given.role,
            layout=given.layout,
            written=records.WrittenRows.from_json(given.written) if given.written is not None else None,
            chunk=given.chunk,
            rows=records.StreamRows.from_json(given.rows) if given.rows is not None else None,
            operator=given.operator,
        )
        found.append(entry)
    return found


def _graph_entries(graphs: list[Graph], shared: dict[str, list[str]]) -> list[records.GraphEntry]:
    return [
        records.GraphEntry(
            name=graph.name,
            file=f"{graph.name}.onnx",
            tokens=graph.tokens,
            stride=graph.stride,
            offsets=graph.offsets,
            weights=tuple(shared[graph.name]),
        )
        for graph in graphs
    ]


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    graphs: list[Graph],
    golden: Golden,
    limits: OutputLimits,
    progress: Callable[[str], None],
    bar: Bar,
) -> None:
    """Writes all files of the bundle into an empty folder."""
    model = checkpoint.model
    models, large = {}, {}
    with bar("tracing", len(graphs), "graphs") as advance:
        for number, graph in enumerate(graphs, start=1):
            progress(f"tracing {graph.name} ({graph.tokens} tokens a call), graph {number} of {len(graphs)}")
            traced = trace_graph(model, graph)
            models[graph.name], large[graph.name] = traced.proto, traced.large
            advance(1)
    size = sum({name: value.nbytes for values in large.values() for name, value in values.items()}.values())
    with bar("writing weights", size, "bytes") as advance:
        shared = share_weights(models, folder / WEIGHTS, large=large, advance=advance)
    for name, proto in models.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    state = {name: value.detach().numpy() for name, value in model.initial_state(1).items()}
    write_safetensors(folder / STATE, state)
    known = write_golden(folder, golden, (model.input.name, model.output.name), limits.tolerance)
    if checkpoint.tokenizer:
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
    given, got = model.input, model.output
    if given.kind == "tokens":
        consumed = records.Input(kind="tokens", name=given.name, dtype="int64", vocab_size=given.size)
    else:
        consumed = records.Input(kind="vectors", name=given.name, dtype="float32", size=given.size)
    records.Manifest(
        producer=f"titans-export {__version__}",
        model=records.Model(
            name=model.name,
            variant=model.variant,
            parameters=sum(p.numel() for p in model.parameters()),
            config=model.config_json(),
            source=_source(checkpoint),
        ),
        input=consumed,
        output=records.Output(kind=got.kind, name=got.name, dtype="float32", size=got.size),
        controls=records.Controls(position=POSITION, learn=LEARN, slots=SLOTS_INPUT if model.pools else None),
        tokenizer=_tokenizer(checkpoint),
        state=tuple(_state_tensors(model)),
        graphs=tuple(_graph_entries(graphs, shared)),
        golden=known,
        stability=limits.stability,
        weights=records.FileReference(file=WEIGHTS),
        initial_state=records.FileReference(file=STATE),
        files={path.name: file_record(path) for path in sorted(folder.iterdir())},
    ).write(folder)


def _source(checkpoint: Checkpoint) -> records.Source:
    origin = checkpoint.origin
    return records.Source(
        format=checkpoint.format,
        weights_sha256=checkpoint.weights_sha256,
        weights=origin.weights,
        dtypes=origin.dtypes,
        library_defaults=dict(origin.library_defaults) or None,
    )


def _tokenizer(checkpoint: Checkpoint) -> records.Tokenizer:
    if checkpoint.tokenizer:
        return records.Tokenizer(kind="file", file=TOKENIZER)
    signal = checkpoint.model.input
    return records.Tokenizer(kind="bytes" if signal.kind == "tokens" and signal.size == 256 else "none")


def _cuts(graphs: list[Graph], positions: int) -> list[int]:
    """Lengths of feeds, at least `positions` tokens in total. Every graph runs once, then lengths are uneven."""
    cuts = covering_cuts(graphs)
    length = 1
    while sum(cuts) < positions:
        cuts.append(min(length, positions - sum(cuts)))
        length = length * 3 % 1021
    return cuts


class _Run(NamedTuple):
    """A run of the bundle: `running_error` (T,), bytes of one stream's state, and the largest norms of its memory."""

    error: Floats
    state_bytes: int
    norms: dict[str, float]


def _run(
    folder: Path, inputs: NDArray[Any], cuts: list[int], right: Rows, advance: Advance = lambda tokens: None
) -> _Run:
    """Runs the bundle in the runtime, fed in the given cuts, and compares its outputs with the right ones (T, size).

    Norms are read at most NORM_READS times.
    """
    import titans_runtime

    names = records.read_manifest(folder).guarded_fields
    with titans_runtime.Session(folder, guard="off") as session:
        stream = session.stream()
        norms = seen_norms(stream, names, {})
        error = RunningError(right)
        at = read = 0
        for part in np.split(inputs, np.cumsum(cuts)[:-1]):
            outputs = stream.feed(part)
            assert outputs is not None
            error.add(outputs)
            at += len(part)
            if at * NORM_READS >= (read + 1) * len(inputs):
                norms, read = seen_norms(stream, names, norms), at * NORM_READS // len(inputs)
            advance(len(part))
        return _Run(error.finish(), stream.state_bytes, norms)


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    format: str = "titans",
    config: str | None = None,
    bug_compatible: int | None = None,
    weights: str | None = None,
    library_defaults: bool = False,
    chunks_per_call: int = 4,
    overwrite: bool = False,
    positions: int | None = None,
    accept_unstable: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    bar: Bar = no_bar,
) -> ExportReport:
    """Exports the checkpoint at `source`, of the named format, to the bundle `output`.

    source: a file, an index of shards, a folder, or an address of the hub (hub.py). config, bug_compatible, weights,
    library_defaults: see `LoadOptions`. For the other parameters see `export_loaded`.
    """
    _check_numbers(chunks_per_call, positions)
    if hub.is_address(source):
        check_output(output, overwrite, MANIFEST)
        source = hub.fetch(source, progress)
    check_output(output, overwrite, MANIFEST, source=source)
    progress(f"loading {source}")
    checkpoint = load_checkpoint(source, format, LoadOptions(config, bug_compatible, weights, library_defaults))
    for line in checkpoint.origin.notes:
        progress(line)
    return export_loaded(
        checkpoint,
        output,
        chunks_per_call=chunks_per_call,
        overwrite=overwrite,
        positions=positions,
        accept_unstable=accept_unstable,
        progress=progress,
        bar=bar,
    )


def _check_numbers(chunks_per_call: int, positions: int | None) -> None:
    for name, value in (("chunks-per-call", chunks_per_call), ("positions", positions)):
        if value is not None and value < 1:
            problem = f"invalid value of --{name}: expected at least 1, got {value}"
            raise UsageError("E0104", "export", problem, "give a larger number")


def export_module(
    module: torch.nn.Module,
    output: Path,
    *,
    bug_compatible: int | None = None,
    chunks_per_call: int = 4,
    overwrite: bool = False,
    positions: int | None = None,
    accept_unstable: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    bar: Bar = no_bar,
) -> ExportReport:
    """Exports a live MemoryAsContextTransformer or NeuralMemory of titans-pytorch to the bundle `output`.

    The constructor's arguments are read from the module. bug_compatible: see `LoadOptions`. For the other parameters
    see `export_loaded`.
    """
    from .checkpoints.titans_pytorch import from_live

    return export_loaded(
        from_live(module, Path(output).stem, bug_compatible),
        Path(output),
        chunks_per_call=chunks_per_call,
        overwrite=overwrite,
        positions=positions,
        accept_unstable=accept_unstable,
        progress=progress,
        bar=bar,
    )


def _limit(folder: Path, limits: OutputLimits) -> None:
    """Writes other limits into the manifest."""
    manifest = records.read_manifest(folder)
    golden = replace(manifest.golden, tolerance=limits.tolerance)
    replace(manifest, golden=golden, stability=limits.stability).write(folder)


def _check(model: StreamModel, error: NDArray[np.float64], limits: NDArray[np.float64]) -> None:
    """Raises MismatchError if an error (T,) exceeds its limit. error: ascending, as of `running_error`."""
    if beyond := first_beyond(error, limits):
        problem = f"{model.output.kind} differ from PyTorch: {beyond}"
        raise MismatchError("E0901", "export", problem, "report the message with the checkpoint's configuration")


def export_loaded(
    checkpoint: Checkpoint,
    output: Path,
    *,
    chunks_per_call: int = 4,
    overwrite: bool = False,
    positions: int | None = None,
    accept_unstable: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    bar: Bar = no_bar,
) -> ExportReport:
    """Exports a loaded checkpoint to the bundle `output`.

    The C++ runtime runs the bundle over `positions` tokens, or more until every graph has run once. By default it is
    1,024 tokens, or as many as two chunks and two segments need. They become the golden stream. The outputs are
    compared with float64 PyTorch; the report also has the error of float32 PyTorch. The tolerance follows from that
    error, and from simulated rounding errors if the bundle errs by more. Then the folder is renamed into place
    atomically. A model that amplifies rounding is compared up to what rounding explains (stability.py); with
    accept_unstable also one that float32 follows only briefly. Raises TitansError, such as MismatchError if outputs
    differ by more. An export that fails writes nothing.
    """
    began = time.monotonic()
    _check_numbers(chunks_per_call, positions)
    weights_bytes = sum(value.numel() * value.element_size() for value in checkpoint.model.parameters())
    check_output(output, overwrite, MANIFEST, needs=weights_bytes)
    if checkpoint.tokenizer and checkpoint.model.input.kind == "tokens":
        for difference in check_vocabulary(checkpoint.tokenizer, checkpoint.model.input.size):
            progress(difference)
    with row_file(output.resolve().parent, checkpoint.model.output.size) as outputs:
        return _export(
            checkpoint, output, outputs, chunks_per_call, overwrite, positions, accept_unstable, progress, bar, began
        )


def _export(
    checkpoint: Checkpoint,
    output: Path,
    float64: RowFile,
    chunks_per_call: int,
    overwrite: bool,
    positions: int | None,
    accept_unstable: bool,
    progress: Callable[[str], None],
    bar: Bar,
    began: float,
) -> ExportReport:
    """`export_loaded` after its checks. float64: where the right outputs go."""
    model = checkpoint.model
    graphs = model.graphs(chunks_per_call)
    if chunks_per_call > 1 and max(graph.tokens for graph in graphs) == 1:
        progress("no call of several tokens starts at the same place of chunk and segment: prompts run token by token")
    least = least_positions(model, graphs)
    cuts = _cuts(graphs, usual_positions(model, graphs) if positions is None else positions)
    positions = sum(cuts)
    if positions < least:
        progress(f"{positions} golden positions are too few to find every fault: {least} find it")
    inputs = sample_inputs(model, positions)
    progress(f"running PyTorch over {positions} tokens, in float32 and float64")
    builder = GoldenBuilder(
        inputs[0].numpy(),
        model.output.size,
        logits=model.output.kind == "logits",
        periods=periods_of(model, graphs),
        least=least,
    )

    def keep(rows: NDArray[Any]) -> None:
        float64.append(rows)
        builder.add(rows)

    with bar("PyTorch in float64", positions, "tokens") as advance, unrounded(model), Float64():
        run_outputs(model, inputs, keep, advance)
    with bar("PyTorch in float32", positions, "tokens") as advance:
        own = model_error(model, inputs, float64, advance)
    library_error = library_error_of(checkpoint, inputs, float64)
    return_free_memory()
    limits = stable_limits(model, inputs, float64, own, accept_unstable, progress)
    if limits.tolerance > TOLERANCE and limits.stability is None:
        progress(f"PyTorch float32 is itself {own[-1]:.2g} from float64: the tolerance becomes {limits.tolerance:g}")
    with replacing_folder(output, overwrite, MANIFEST) as folder:
        _write(folder, checkpoint, graphs, builder.finish(), limits, progress, bar)
        map_parameters(model, folder / WEIGHTS)  # the runtime holds the weights as well
        progress(f"comparing the bundle with PyTorch over {positions} tokens")
        with bar("running the bundle", positions, "tokens") as advance:
            run = _run(folder, inputs[0].numpy(), cuts, float64, advance)
        if limits.stability is None and first_beyond(run.error, limits.at(0, positions)):
            limits = explained_limits(model, inputs, float64, own, accept_unstable, progress)
            _limit(folder, limits)
        _check(model, run.error, limits.at(0, positions))
        if limits.stability is not None:
            progress("comparing single calls of each graph with PyTorch")
            check_calls(folder, model, graphs, inputs)
        replace(records.read_manifest(folder), guard=seen_record(run.norms)).write(folder)
        report = ExportReport(
            bundle=str(output),
            variant=model.variant,
            parameters=sum(p.numel() for p in model.parameters()),
            graphs=[graph.name for graph in graphs],
            weights_bytes=(folder / WEIGHTS).stat().st_size,
            state_bytes=run.state_bytes,
            positions=positions,
            max_abs_error=float(run.error[-1]),
            pytorch_float32_error=float(own[-1]),
            library_error=library_error,
            tolerance=limits.tolerance,
            stability=limits.stability,
            seconds=round(time.monotonic() - began, 1),
            source=checkpoint.origin.to_json(),
        )
    return report
