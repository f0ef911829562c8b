"""The format of each matmul and embedding: scales, input factors and rounded weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from titans_calibration.awq import awq_scales
from titans_calibration.gptq import gptq
from titans_calibration.matmuls import FLOAT32, Matmul, QuantiseError, is_lookup
from titans_calibration.smooth import smoothing
from titans_calibration.weights import LARGEST, QuantisedMatrix, quantise, scales_of
from titans_export.onnx.initializers import float_tensor, initializers_of, make_tensor
from titans_export.onnx.mapped import array_of
from titans_export.onnx.nodes import names_read, subgraphs

if TYPE_CHECKING:
    from titans_calibration.observe import Observations, Observed
    from titans_calibration.recipe import Recipe

SMALLEST = 4096  # elements; quantising a smaller matrix adds more nodes than it saves bytes
CASTS = ("float16", "bfloat16")
_EXACT = (-1.0, 0.0, 1.0)
_ROWS = 64  # rows that are checked at once


def choose_format(matmul: Matmul, recipe: Recipe, observations: Observations | None, format: str | None) -> None:
    """Sets the matmul's format, or the reason why it stays float32."""
    wanted = format or recipe.weights.format
    rows, columns = matmul.matrix.shape
    group = recipe.weights.group if wanted in LARGEST else None
    if matmul.why:
        return
    if format == FLOAT32 or recipe.weights.format == FLOAT32:
        matmul.why = "so chosen"
    elif any(fnmatch.fnmatchcase(matmul.name, pattern) for pattern in recipe.keep):
        matmul.why = "the recipe keeps it"
    elif rows * columns < SMALLEST:
        matmul.why = f"{rows}x{columns}: fewer than {SMALLEST} elements"
    elif _is_exact(matmul.matrix):
        matmul.why = "only 0, 1 and -1: a permutation, exact as it is"
    elif group is not None and rows % group:
        matmul.why = f"its {rows} input channels are no multiple of the group {group}"
    elif _by_data(recipe, wanted) and (observations is None or matmul.name not in observations):
        if observations is None:
            raise QuantiseError(
                "E0809", "quantize", f"the recipe {recipe.name} needs observations of {matmul.name}", "give data"
            )
        matmul.why = "the data never reached it"
    else:
        _check_finite(matmul.name, matmul.matrix)
        matmul.format, matmul.group = wanted, group


def _is_exact(matrix: NDArray[np.float32]) -> bool:
    return all(np.isin(matrix[row : row + _ROWS], _EXACT).all() for row in range(0, len(matrix), _ROWS))


def _check_finite(name: str, matrix: NDArray[np.float32]) -> None:
    if not all(np.isfinite(matrix[row : row + _ROWS]).all() for row in range(0, len(matrix), _ROWS)):
        raise QuantiseError("E0808", "quantize", f"weights in {name} are not finite", "repair the checkpoint")


def _by_data(recipe: Recipe, format: str) -> bool:
    activations = recipe.activations is not None and format == recipe.activations.format
    return activations or recipe.smooth is not None or recipe.weights.method in ("awq", "gptq")


def shared_inputs(matmuls: Iterable[Matmul]) -> list[list[Matmul]]:
    """The matmuls to quantise, grouped if they share an input in some graph, in the order of their names."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    chosen = {matmul.name: matmul for matmul in matmuls if matmul.format in LARGEST}
    first: dict[tuple[str, str, str], str] = {}
    for name, matmul in chosen.items():
        for use in matmul.uses:
            # Each format rounds the input in its own way.
            leader[find(name)] = find(first.setdefault((use.graph, use.input, matmul.format), name))
    groups: dict[str, list[Matmul]] = {}
    for name in sorted(chosen):
        groups.setdefault(find(name), []).append(chosen[name])
    return list(groups.values())


def _observed(group: Sequence[Matmul], observations: Observations) -> Observed:
    merged = observations[group[0].name]
    for matmul in group[1:]:
        merged = merged.merged(observations[matmul.name])
    return merged


def scale_inputs(group: Sequence[Matmul], recipe: Recipe, observations: Observations | None) -> None:
    """Sets the factors and the scale of the group's input."""
    format = group[0].format
    activations = recipe.activations if recipe.activations and recipe.activations.format == format else None
    if observations is None or not (activations or recipe.weights.method == "awq"):
        return
    from titans_calibration.observe import activation_limit

    seen = _observed(group, observations)
    factors = None
    if activations and recipe.smooth is not None:
        factors = smoothing(seen.channels, [matmul.matrix for matmul in group], recipe.smooth)
    elif recipe.weights.method == "awq":
        matrices = [matmul.matrix for matmul in group]
        gram = seen.gram.matrix() if seen.gram is not None else None
        factors = awq_scales(seen.mean_abs, matrices, format, group[0].group, gram)
    limit = 0.0
    if activations:
        limit = activation_limit(seen, activations.method, activations.percentile, int(LARGEST[format]))
        if factors is not None:
            # The histogram is of the input before the division: the new range is clipped by the same share.
            before = float(np.max(seen.channels, initial=0.0))
            after = float(np.max(seen.channels / factors, initial=0.0))
            limit = after * (limit / before if before else 1.0)
    for matmul in group:
        matmul.leader, matmul.factors = group[0].name, factors
        if activations:
            matmul.input_scale = np.float32(scales_of(np.float64(limit), format))


def quantise_weight(matmul: Matmul, recipe: Recipe, observations: Observations | None) -> QuantisedMatrix:
    """Quantises the weight by the recipe's method, after multiplying its channels by the input's factors."""
    matrix, method = matmul.matrix, recipe.weights.method
    if matmul.factors is not None:
        matrix = matrix * matmul.factors[:, None]
    if method == "gptq":
        assert observations is not None
        seen = observations[matmul.name].gram
        if seen is None:
            raise QuantiseError("E0809", "quantize", f"{matmul.name} has no Gram matrix", "observe with gram")
        gram = seen.matrix()
        if matmul.factors is not None:
            gram = gram / np.outer(matmul.factors, matmul.factors).astype(np.float64)
        return gptq(matrix, gram, matmul.format, matmul.group)
    return quantise(matrix, matmul.format, matmul.group, "mse" if method == "mse" else "minmax")


@dataclass(frozen=True)
class Table:
    """A quantised embedding."""

    format: str
    values: TensorProto
    scales: NDArray[np.float32] | None


def find_tables(models: Mapping[str, ModelProto], recipe: Recipe, matmuls: Mapping[str, Matmul]) -> dict[str, Table]:
    """Tables that are only read by Gather along axis 0, in the recipe's format."""
    if recipe.embedding == FLOAT32:
        return {}
    tables: dict[str, NDArray[np.float32]] = {}
    refused = set(matmuls)
    for model in models.values():
        tensors = initializers_of(model.graph)
        gathered = {node.input[0] for node in model.graph.node if is_lookup(node)} & set(tensors)
        elsewhere = {value.name for value in model.graph.output}
        for node in model.graph.node:
            elsewhere.update(node.input[1:] if is_lookup(node) else node.input)
            elsewhere.update(name for inner in subgraphs(node) for name in names_read(inner))
        refused |= elsewhere
        for name in sorted(gathered - elsewhere):
            tensor = tensors[name]
            kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.keep)
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or kept or name in tables:
                continue
            matrix = array_of(tensor)
            if matrix.size >= SMALLEST:
                tables[name] = matrix
    return {name: _table(name, table, recipe.embedding) for name, table in tables.items() if name not in refused}


def _table(name: str, matrix: NDArray[np.float32], format: str) -> Table:
    _check_finite(name, matrix)
    if format == "float16":
        return Table(format, cast_weight(f"{name}.float16", matrix, format), None)
    quantised = quantise(matrix, format, None, "minmax")
    data = np.ascontiguousarray(quantised.values).tobytes()
    values = make_tensor(f"{name}.int8", "int8", matrix.shape, data)
    return Table(format, values, quantised.scales[0])


def cast_weight(name: str, matrix: NDArray[np.float32], format: str) -> TensorProto:
    """The matrix in float16 or bfloat16. Raises QuantiseError if a value exceeds float16."""
    if format == "float16":
        largest = float(np.abs(matrix).max(initial=0.0))
        if not largest <= float(np.finfo(np.float16).max):
            raise QuantiseError(
                "E0811", "quantize",
                f"weights of {name.rpartition('.')[0]} exceed float16: expected at most 65504, got {largest:g}",
                "take bfloat16, or keep it float32",
            )  # fmt: skip
    return float_tensor(name, format, matrix)
