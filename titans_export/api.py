"""The commands as functions: `titans_export.export`, `quantize`, `build` and `verify`.

They raise the errors of `titans_export.errors`, and print nothing. PyTorch and ONNX are imported by the first call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from titans_calibration.quantize import QuantizeReport
    from titans_calibration.recipe import Recipe

    from .engines.build import Report as BuildReport
    from .exporting import ExportReport
    from .verifying import VerifyReport

StrPath: TypeAlias = str | os.PathLike[str]


def export(
    checkpoint: StrPath,
    output: StrPath,
    *,
    format: str = "titans",
    config: StrPath | None = None,
    weights: str | None = None,
    library_defaults: bool = False,
    bug_compatible: int | None = None,
    chunks_per_call: int = 4,
    positions: int | None = None,
    accept_unstable: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Converts a checkpoint to the bundle `output`, NAME.titans, and compares the bundle with PyTorch.

    checkpoint: a file, an index of shards, or a folder. format: "titans", "titans-pytorch" or "titans-pytorch-mlx".
    config: a JSON file, or "train_mac". weights: the state dict to read, or "ema". positions: length of the golden
    stream, in tokens. The other parameters are the options of `titans-export export`. Raises CheckpointError,
    OutputError, UsageError, and MismatchError if the bundle differs from PyTorch; nothing is written then.
    """
    from .exporting import export_checkpoint

    return export_checkpoint(
        Path(checkpoint),
        Path(output),
        format=format,
        config=None if config is None else os.fspath(config),
        weights=weights,
        library_defaults=library_defaults,
        bug_compatible=bug_compatible,
        chunks_per_call=chunks_per_call,
        positions=positions,
        accept_unstable=accept_unstable,
        overwrite=overwrite,
    )


def quantize(
    bundle: StrPath,
    output: StrPath,
    recipe: str | Recipe,
    *,
    data: Sequence[StrPath] = (),
    tokens: int = 1 << 15,
    seed: int = 0,
    memory: str | None = None,
    keep: Sequence[str] = (),
    target: str | None = None,
    encoding_errors: str = "strict",
    overwrite: bool = False,
) -> QuantizeReport:
    """Writes the bundle in the formats of a recipe to `output`.

    recipe: a built-in name, a file NAME.toml, or a Recipe. data: calibration files, of which at most `tokens` tokens
    are read. memory: DTYPE[:ROUNDING] in place of the recipe's. keep: patterns of weights that stay in float32.
    encoding_errors: "strict" or "replace", for text that is not UTF-8. Raises BundleError, RecipeError, OutputError and
    UsageError; nothing is written then.
    """
    import dataclasses

    from titans_calibration.options import QuantizeOptions
    from titans_calibration.quantize import quantize_bundle
    from titans_calibration.recipe import load_recipe, with_memory

    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if memory is not None:
        chosen = with_memory(chosen, memory)
    chosen = dataclasses.replace(chosen, keep=(*chosen.keep, *keep))
    files = tuple(Path(file) for file in data)
    return quantize_bundle(
        QuantizeOptions(Path(bundle), Path(output), chosen, files, tokens, seed, overwrite, target, encoding_errors)
    )


def build(
    bundle: StrPath,
    target: str,
    *,
    precision: str | None = None,
    output: StrPath | None = None,
    name: str | None = None,
    graphs: Sequence[str] = (),
    compiler: str | None = None,
    overwrite: bool = False,
) -> BuildReport:
    """Builds an engine for a device into the bundle, or into a copy of it at `output`.

    target: a name of `titans-export build --list-targets`. precision: "fp32", "fp16" or "bf16". graphs: names; empty
    builds all. Raises BundleError, MachineError if this machine cannot build it, OutputError and UsageError; nothing is
    written then.
    """
    from .engines.build import build_engine
    from .engines.plan import Request

    request = Request(target, precision, compiler, name, tuple(graphs))
    return build_engine(Path(bundle), request, output=None if output is None else Path(output), overwrite=overwrite)


def verify(
    bundle: StrPath,
    *,
    device: str = "cpu",
    backend: str | None = None,
    engine: str | None = None,
    threads: int = 0,
    tokens: int | None = None,
    tolerance: float | None = None,
) -> VerifyReport:
    """Compares the runtime with the bundle's golden outputs: fed whole, token by token, and in random cuts.

    device: "cpu", "cuda" or "cuda:N". tokens: at most so many are compared; None compares all. tolerance: maximum
    absolute difference of an output; None takes the bundle's. The report's `passed` is the verdict. Raises BundleError,
    and titans_runtime.Error if the device cannot run the bundle.
    """
    import titans_runtime

    from .bundle import read_bundle
    from .verifying import verify_stream

    opened = read_bundle(Path(bundle))
    golden = opened.golden()
    session = titans_runtime.Session(opened.path, device=device, backend=backend, engine=engine, threads=threads)
    with session:
        return verify_stream(session, golden.inputs[:tokens], golden, opened.limits(tolerance))
