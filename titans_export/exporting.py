"""From a checkpoint to a bundle that is known to reproduce PyTorch."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import __version__
from .bundle import FORMAT, GOLDEN, MANIFEST, SCHEMA_VERSION, STATE, TOKENIZER, WEIGHTS, file_entry
from .checkpoints import Checkpoint, load_checkpoint
from .errors import MismatchError, UsageError
from .files import check_output, replacing_folder
from .model import Titans
from .model.operator import Layout
from .onnx.graphs import LEARN, LOGITS, NEXT, POSITION, TOKENS, Graph, export_graph, schedule
from .onnx.weights import share_weights
from .safetensors_file import write_safetensors

TOLERANCE = 1e-4  # absolute, on logits
GOLDEN_GRID = 2.0**-16  # golden logits are multiples of it: finer differences between machines round away
GOLDEN_FLOATS = 1 << 19  # at most so many golden logits
ROLES = {"memory": "memory", "conv": "conv", "context_conv": "conv", "keys": "cache", "values": "cache"}


@dataclass(frozen=True)
class ExportReport:
    """What an export did. Errors are the largest absolute differences of logits over `positions` tokens."""

    bundle: str
    variant: str
    parameters: int
    graphs: list[str]
    weights_bytes: int
    state_bytes: int
    positions: int
    max_abs_error: float
    pytorch_float32_error: float
    tolerance: float
    seconds: float


def _state_table(model: Titans) -> list[dict[str, Any]]:
    table = []
    for name, value in model.initial_state(1).items():
        role = ROLES[name.rsplit(".", 1)[-1]]
        entry: dict[str, Any] = {
            "name": name,
            "input": name,
            "output": name + NEXT,
            "dtype": "float32",
            "shape": list(value.shape),
            "role": role,
        }
        if role == "memory":
            fields = Layout.of(model.config.memory.spec).fields
            entry["layout"] = [{"name": f.name, "offset": f.offset, "shape": list(f.shape)} for f in fields]
        if role == "cache" and model.config.variant == "mac":
            persistent, segment = model.config.persistent, model.config.window
            entry["written"] = {"axis": 2, "first": [persistent, persistent + segment], "period": segment}
        table.append(entry)
    return table


def _sample_tokens(model: Titans, count: int) -> torch.Tensor:
    """(1, count) tokens that are the same everywhere: the low bits of a multiplicative sequence."""
    values, x = [], 1
    for _ in range(count):
        x = x * 6364136223846793005 + 1442695040888963407 & 0xFFFFFFFFFFFFFFFF
        values.append((x >> 33) % model.config.vocab_size)
    return torch.tensor([values])


def _logits(model: Titans, tokens: torch.Tensor) -> NDArray[Any]:
    """Logits (T, vocab) of one stream from a fresh memory, in the model's precision."""
    return model.feed(tokens, model.initial_state(1), 0)[0][0].numpy()


def _write(
    folder: Path, checkpoint: Checkpoint, graphs: list[Graph], golden: tuple[torch.Tensor, NDArray[Any]], progress: Any
) -> None:
    """Everything of the bundle, into an empty folder."""
    model = checkpoint.model
    models = {}
    for number, graph in enumerate(graphs, start=1):
        progress(f"tracing {graph.name} ({graph.tokens} tokens a call), graph {number} of {len(graphs)}")
        models[graph.name] = export_graph(model, graph)
    shared = share_weights(models, folder / WEIGHTS)
    for name, proto in models.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    state = {name: value.detach().numpy() for name, value in model.initial_state(1).items()}
    write_safetensors(folder / STATE, state)
    tokens, logits = golden
    grid = (np.round(logits / GOLDEN_GRID) * GOLDEN_GRID).astype(np.float32)
    write_safetensors(folder / GOLDEN, {"tokens": tokens[0].numpy().astype(np.int32), "logits": grid})
    if checkpoint.tokenizer:
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
    config = model.config
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "producer": f"titans-export {__version__}",
        "model": {
            "name": config.name,
            "variant": config.variant,
            "parameters": sum(p.numel() for p in model.parameters()),
            "config": config.to_json(),
            "source": {"format": checkpoint.format, "weights_sha256": checkpoint.weights_sha256},
        },
        "input": {"kind": "tokens", "name": TOKENS, "dtype": "int64", "vocab_size": config.vocab_size},
        "output": {"kind": "logits", "name": LOGITS, "dtype": "float32", "size": config.vocab_size},
        "controls": {"position": POSITION, "learn": LEARN},
        "tokenizer": _tokenizer(checkpoint),
        "state": _state_table(model),
        "graphs": [
            {"name": g.name, "file": f"{g.name}.onnx", "tokens": g.tokens, "align": g.align, "weights": shared[g.name]}
            for g in graphs
        ],
        "golden": {"file": GOLDEN, "tokens": "tokens", "logits": "logits", "tolerance": TOLERANCE},
        "weights": {"file": WEIGHTS},
        "initial_state": {"file": STATE},
        "files": {path.name: file_entry(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.tokenizer:
        return {"kind": "file", "file": TOKENIZER}
    return {"kind": "bytes"} if checkpoint.model.config.vocab_size == 256 else {"kind": "none"}


def _cuts(graphs: list[Graph], positions: int) -> list[int]:
    """Lengths of feeds that make every graph of the schedule run, then uneven ones, of `positions` or more in all."""
    cuts, length = [graph.tokens for graph in graphs], 1
    while sum(cuts) < positions:
        cuts.append(min(length, positions - sum(cuts)))
        length = length * 3 % 1021
    return cuts


def _run(folder: Path, tokens: NDArray[np.int64], cuts: list[int]) -> tuple[NDArray[np.float32], int]:
    """The bundle's logits through the runtime, fed in the given cuts, and the bytes of a stream's state."""
    import titans_runtime

    with titans_runtime.Session(folder) as session:
        stream = session.stream()
        rows: list[NDArray[np.float32]] = []
        for part in np.split(tokens, np.cumsum(cuts)[:-1]):
            logits = stream.feed(part)
            assert logits is not None
            rows.append(logits)
        return np.concatenate(rows), stream.state_bytes


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    format: str = "titans",
    chunks_per_call: int = 4,
    overwrite: bool = False,
    positions: int = 1024,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Exports the checkpoint at `source`, of the named format, to the bundle `output`.

    Before it takes its name the C++ runtime runs it over `positions` tokens, or as many as every graph needs to run
    once, and it is compared with PyTorch in float64; the report has PyTorch's own float32 beside it. Raises
    TitansError, of which MismatchError when the logits differ by more than the tolerance; then nothing is written.
    """
    began = time.monotonic()
    for name, value in (("chunks-per-call", chunks_per_call), ("positions", positions)):
        if value < 1:
            raise UsageError("export", f"--{name} of at least 1", str(value), "give a larger one")
    check_output(output, overwrite, MANIFEST)
    progress(f"loading {source}")
    checkpoint = load_checkpoint(source, format)
    model = checkpoint.model
    vocab = model.config.vocab_size
    graphs = schedule(model, chunks_per_call)
    cuts = _cuts(graphs, positions)
    positions = sum(cuts)
    tokens = _sample_tokens(model, positions)
    progress(f"running PyTorch over {positions} tokens, in float32 and float64")
    float32 = _logits(model, tokens)
    float64 = _logits(copy.deepcopy(model).double(), tokens)
    kept = min(positions, max(GOLDEN_FLOATS // vocab, 2))
    with replacing_folder(output, overwrite, MANIFEST) as folder:
        _write(folder, checkpoint, graphs, (tokens[:, :kept], float64[:kept]), progress)
        progress(f"comparing the bundle with PyTorch over {positions} tokens")
        logits, state_bytes = _run(folder, tokens[0].numpy(), cuts)
        error = np.abs(logits - float64)
        # not <=, so that NaN is a mismatch
        if not error.max() <= TOLERANCE:
            bad = int(np.argmax(~(error.max(-1) <= TOLERANCE)))
            raise MismatchError(
                "export",
                f"logits within {TOLERANCE:g} of PyTorch",
                f"{error.max():.3g}, first beyond it at position {bad}",
                "report this with the checkpoint's config.json",
            )
        report = ExportReport(
            bundle=str(output),
            variant=model.config.variant,
            parameters=sum(p.numel() for p in model.parameters()),
            graphs=[graph.name for graph in graphs],
            weights_bytes=(folder / WEIGHTS).stat().st_size,
            state_bytes=state_bytes,
            positions=positions,
            max_abs_error=float(error.max()),
            pytorch_float32_error=float(np.abs(float32 - float64).max()),
            tolerance=TOLERANCE,
            seconds=round(time.monotonic() - began, 1),
        )
    return report
