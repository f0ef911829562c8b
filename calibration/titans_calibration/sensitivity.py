"""The mixed sweep: measures each matmul over held-back data and keeps the most sensitive ones in a fallback."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import xxhash
from numpy.typing import NDArray

from titans_calibration.data import Data, DataError
from titans_calibration.graphs import Quantised, quantise_graphs
from titans_calibration.instrument import open_runner
from titans_calibration.matmuls import matmul_weights
from titans_calibration.observe import Observations
from titans_calibration.recipe import MemoryRecipe, MixedRecipe, Recipe, RecipeError
from titans_calibration.source import Source
from titans_export import __version__
from titans_export.bundle import Bundle
from titans_export.files import replacing_file
from titans_export.onnx.initializers import tensor_bytes
from titans_export.schedule import calls

_OUTPUT_BYTES = 256 << 20  # most bytes of float32 outputs, which stay in memory during the sweep
_FLOAT32 = "float32"


@dataclass(frozen=True)
class Sensitivity:
    """A group of matmuls, measured with only these quantised.

    divergence: KL divergence from float32 in bits per token; for vectors the relative mean squared difference.
    bits_increase: percent, None for vectors. saved_bytes: without scales.
    """

    name: str
    matmuls: tuple[str, ...]
    divergence: float
    bits_increase: float | None
    saved_bytes: int


@dataclass(frozen=True)
class Mixture:
    """The decision. kept: names of `sensitivities` that stay in the fallback, the most sensitive first."""

    formats: dict[str, str]
    kept: tuple[str, ...]
    sensitivities: tuple[Sensitivity, ...]
    bits: float | None
    float32_bits: float | None
    weights_bytes: int
    tokens: int


def split_held_back(bundle: Bundle, data: Data, share: float) -> tuple[Data, Data]:
    """Splits the last `share` off each stream, in whole calls of the largest graph.

    Raises DataError if no stream is long enough.
    """
    call = max(graph.tokens for graph in bundle.manifest.graphs)
    size = bundle.manifest.output.size
    room = max(1, _OUTPUT_BYTES // (4 * size * call))  # calls
    first, ends, names = [], [], []
    for stream, source in zip(data.streams, data.sources, strict=True):
        calls = min(int(len(stream) * share) // call, room)
        room -= calls
        cut = len(stream) - calls * call
        first.append(stream[:cut])
        if calls:
            ends.append(stream[cut:])
            names.append(source)
    if not ends:
        need = int(np.ceil(call / share))
        longest = max(map(len, data.streams))
        raise DataError(
            "E0806",
            "data",
            f"too little data to hold back {share:.0%} in whole calls of {call} tokens: "
            f"expected a stream of at least {need} tokens, got {longest} in the longest",
            "give longer streams, or a larger --tokens",
        )
    return Data(tuple(first), data.sources, data.seed), Data(tuple(ends), tuple(names), data.seed)


def choose_mixture(
    source: Source,
    recipe: Recipe,
    observations: Observations | None,
    held_back: Data,
    progress: Callable[[str], None] = lambda text: None,
    work: Path | None = None,
) -> Mixture:
    """Chooses the matmuls that stay in the recipe's fallback, so that the budget is met. Deterministic.

    Matmuls are ranked by divergence per saved byte. A budget of bits keeps the fewest that meet it, found by bisection;
    a budget of bytes keeps as many as fit. `work` is a file for measurements, which a later call with the same bundle,
    recipe, observations and data reuses. Raises RecipeError if the budget cannot be met.
    """
    mixed, bundle = recipe.mixed, source.bundle
    assert mixed is not None
    if mixed.max_bits_increase is not None and bundle.takes_vectors:
        raise RecipeError(
            "E0803", "recipe", f"mixed.max_bits_increase in {recipe.name}: a bundle of vectors has no bits",
            "give mixed.max_weights_bytes",
        )  # fmt: skip
    measured = _Measured(work, _key(bundle, recipe, observations, held_back))
    if measured.values:
        progress(f"{len(measured.values)} mixtures were measured before")
    search = _Search(source, recipe, mixed, observations, held_back, measured)
    ranked = search.rank(progress)
    if mixed.max_bits_increase is not None:
        count = search.fewest(ranked, mixed.max_bits_increase, progress)
    else:
        count = search.most(ranked, mixed.max_weights_bytes or 0)
    return search.mixture(ranked, count)


_Measurement = tuple[float, float | None]  # divergence, and by how many percent bits grow


class _Measured:
    """Measurements by name, in a file from which an interrupted sweep continues."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self.values: dict[str, _Measurement] = {}
        if path is not None:
            try:
                saved = json.loads(path.read_bytes())
                if saved["key"] == key:
                    self.values = {name: (divergence, bits) for name, (divergence, bits) in saved["measured"].items()}
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                pass  # missing or damaged

    def of(self, name: str, measure: Callable[[], _Measurement]) -> _Measurement:
        """The measurement of that name, made at most once."""
        if name not in self.values:
            self.values[name] = measure()
            if self._path is not None:
                with replacing_file(self._path) as aside:
                    aside.write_text(json.dumps({"key": self._key, "measured": self.values}), encoding="utf-8")
        return self.values[name]


def _key(bundle: Bundle, recipe: Recipe, observations: Observations | None, data: Data) -> str:
    """A hash of everything that a measurement depends on."""
    facts = [__version__, json.dumps(bundle.manifest.raw, sort_keys=True), recipe.as_dict(), data.xxh3_128]
    digest = xxhash.xxh3_128(repr(facts).encode())
    for name, seen in sorted((observations or {}).items()):
        digest.update(repr((name, seen.count, seen.low, seen.high, seen.limit)).encode())
        for values in (seen.channels, seen.sum_abs, seen.counts, *(seen.gram.parts if seen.gram else ())):
            digest.update(values.tobytes())
    return digest.hexdigest()


class _Search:
    """Measures mixtures of one bundle over the same data, each once."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        mixed: MixedRecipe,
        observations: Observations | None,
        data: Data,
        measured: _Measured,
    ) -> None:
        self._measured = measured
        bundle = source.bundle
        self._bundle, self._mixed, self._observations, self._data = bundle, mixed, observations, data
        self._recipe = dataclasses.replace(recipe, mixed=None, memory=MemoryRecipe())
        self._all = source.models
        self._models = {name: self._all[name] for name in _graphs_for(bundle, data)}
        self._right = _outputs(bundle, self._models, data)
        self._bits = None if bundle.takes_vectors else mean_bits(self._right, data.streams)
        full = self._quantise(self._all, {})
        self._bytes = initializer_bytes(full.models.values())
        self._chosen = [name for name, format in full.report.matmuls.items() if format != _FLOAT32]

    def rank(self, progress: Callable[[str], None]) -> list[Sensitivity]:
        """All groups, by falling divergence per saved byte."""
        alone = dataclasses.replace(self._recipe, embedding=_FLOAT32)
        plain = initializer_bytes(self._all.values())
        groups = _group_names(self._chosen, self._mixed.by)
        found = []
        for number, (name, matmuls) in enumerate(groups.items(), start=1):

            def measure(name: str = name, matmuls: list[str] = matmuls, number: int = number) -> _Measurement:
                progress(f"quantising {name} alone, {number} of {len(groups)}")
                formats = {other: _FLOAT32 for other in self._chosen if other not in matmuls}
                return self._measure(quantise_graphs(self._models, alone, self._observations, formats).models)

            divergence, increase = self._measured.of(f"{name} alone", measure)
            found.append(Sensitivity(name, tuple(matmuls), divergence, increase, self._saved(plain, matmuls)))
        return sorted(found, key=lambda s: (-s.divergence / max(s.saved_bytes, 1), s.name))

    def fewest(self, ranked: Sequence[Sensitivity], limit: float, progress: Callable[[str], None]) -> int:
        """The least number of groups to keep so that bits grow by at most `limit` percent."""
        low, high = 0, len(ranked)

        def check(count: int) -> bool:
            what = f"{count} of {len(ranked)} in {self._mixed.fallback}"
            increase = self._measured.of(what, lambda: self._measure(self._mixed_models(ranked, count)))[1]
            assert increase is not None
            progress(f"{what}: bits grow by {increase:.3f} %")
            return increase <= limit

        if check(0):
            return 0
        if not check(high):
            raise RecipeError(
                "E0812", "recipe",
                f"bits grow by more than {limit:g} % even with all matmuls in {self._mixed.fallback}",
                "raise mixed.max_bits_increase, or take another fallback or embedding",
            )  # fmt: skip
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if check(middle) else (middle, high)
        return high

    def most(self, ranked: Sequence[Sensitivity], limit: int) -> int:
        """The largest number of groups to keep so that weights take at most `limit` bytes."""
        if self._bytes > limit:
            raise RecipeError(
                "E0812", "recipe",
                f"the quantised weights exceed max_weights_bytes: expected at most {limit} bytes, got {self._bytes}",
                "raise mixed.max_weights_bytes, or take a smaller format",
            )  # fmt: skip
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high + 1) // 2
            models = self._quantise(self._all, self._formats(ranked, middle)).models
            low, high = (middle, high) if initializer_bytes(models.values()) <= limit else (low, middle - 1)
        return low

    def mixture(self, ranked: Sequence[Sensitivity], count: int) -> Mixture:
        """The mixture that keeps the first `count` groups."""
        formats = self._formats(ranked, count)
        whole = self._quantise(self._all, formats).models
        bits = None
        if self._bits is not None:
            running = {name: whole[name] for name in self._models}
            bits = mean_bits(_outputs(self._bundle, running, self._data), self._data.streams)
        kept = tuple(s.name for s in ranked[:count])
        weights = initializer_bytes(whole.values())
        return Mixture(formats, kept, tuple(ranked), bits, self._bits, weights, self._data.tokens)

    def _formats(self, ranked: Sequence[Sensitivity], count: int) -> dict[str, str]:
        return {name: self._mixed.fallback for s in ranked[:count] for name in s.matmuls}

    def _mixed_models(self, ranked: Sequence[Sensitivity], count: int) -> dict[str, onnx.ModelProto]:
        return self._quantise(self._models, self._formats(ranked, count)).models

    def _quantise(self, models: Mapping[str, onnx.ModelProto], formats: Mapping[str, str]) -> Quantised:
        return quantise_graphs(models, self._recipe, self._observations, formats)

    def _saved(self, plain: int, matmuls: Sequence[str]) -> int:
        sizes = matmul_weights(self._all)
        bits = {"int8": 8, "fp8": 8, "int4": 4}[self._recipe.weights.format]
        return min(plain, sum(rows * columns * (32 - bits) // 8 for rows, columns in map(sizes.__getitem__, matmuls)))

    def _measure(self, models: Mapping[str, onnx.ModelProto]) -> _Measurement:
        """Divergence from float32, and growth of bits in percent."""
        outputs = _outputs(self._bundle, models, self._data)
        if self._bits is None:
            error = sum(float(((a - b) ** 2).sum()) for a, b in zip(outputs, self._right, strict=True))
            return error / max(sum(float((b**2).sum()) for b in self._right), 1e-30), None
        pairs = zip(self._right, outputs, strict=True)
        divergence = sum(float(_divergence(right, got).sum()) for right, got in pairs) / self._data.tokens
        return divergence, (mean_bits(outputs, self._data.streams) / self._bits - 1) * 100


def _graphs_for(bundle: Bundle, data: Data) -> list[str]:
    """The graphs that the streams run."""
    graphs = bundle.manifest.graphs
    return sorted({graph.name for stream in data.streams for _, graph in calls(graphs, 0, len(stream))})


def initializer_bytes(models: Any) -> int:
    """Bytes of all initialisers; a name counts once."""
    return sum(
        {t.name: tensor_bytes(t.dims, t.data_type) for model in models for t in model.graph.initializer}.values()
    )


def mean_bits(outputs: Sequence[NDArray[Any]], streams: Sequence[NDArray[Any]]) -> float:
    """Bits per token over all tokens but the first of each stream, from the logits after each token."""
    total = count = 0.0
    for logits, tokens in zip(outputs, streams, strict=True):
        log_p = _log_softmax(logits[:-1])
        total -= float(log_p[np.arange(len(tokens) - 1), tokens[1:]].sum())
        count += len(tokens) - 1
    return total / max(count, 1.0) / float(np.log(2))


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    result: NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result


def _divergence(right: NDArray[Any], got: NDArray[Any]) -> NDArray[np.float64]:
    """KL divergence of each row of logits from the right ones, in bits."""
    p, q = _log_softmax(right), _log_softmax(got)
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1) / np.log(2)
    return result


def _outputs(bundle: Bundle, models: Mapping[str, onnx.ModelProto], data: Data) -> list[NDArray[Any]]:
    """The outputs (T, size) of each stream from a fresh memory."""
    runner = open_runner(bundle, models)
    return [
        np.concatenate([call.values[runner.output][0] for call in runner.stream(stream)]) for stream in data.streams
    ]


def _group_names(names: Sequence[str], by: str) -> dict[str, list[str]]:
    """Matmul names by group: each alone, or by layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"(?:.*\.)?layers\.\d+(?=\.)", name)
        groups.setdefault(layer[0] if by == "layer" and layer else name, []).append(name)
    return groups
