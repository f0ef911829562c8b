"""Rewrites all graphs of a bundle with explicit quantisation, in ONNX's own operators.

A weight gets the same values and scales in every graph. Matmuls with one input share its scale. docs/bundle.md shows
the rewritten forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import ModelProto

from titans_calibration.formats import choose_format, find_tables, quantise_weight, scale_inputs, shared_inputs
from titans_calibration.matmuls import FLOAT32, Matmul, QuantiseError, find_matmuls
from titans_calibration.rewriting import Rewriting
from titans_calibration.weights import LARGEST
from titans_export.onnx.mapped import check_structure

if TYPE_CHECKING:
    from titans_calibration.observe import Observations
    from titans_calibration.recipe import Recipe
    from titans_export.onnx.mapped import Spill


@dataclass(frozen=True)
class GraphReport:
    """What the rewriting did.

    matmuls: format of each weight. kept: why a weight stays float32. scaled: for weights whose input has factors,
    "folded" if every graph has them in the norm before it, else "node".
    """

    matmuls: dict[str, str]
    kept: dict[str, str]
    scaled: dict[str, str]
    embeddings: dict[str, str]


@dataclass(frozen=True)
class Quantised:
    """The rewritten graphs. Weights are inside, or references to mapped files."""

    models: dict[str, ModelProto]
    report: GraphReport


def choose_formats(
    models: Mapping[str, ModelProto],
    recipe: Recipe,
    observations: Observations | None,
    formats: Mapping[str, str] | None = None,
) -> dict[str, Matmul]:
    """The matmuls of the graphs, each with its format or the reason to stay float32. Raises QuantiseError."""
    matmuls = find_matmuls(models)
    for matmul in matmuls.values():
        choose_format(matmul, recipe, observations, (formats or {}).get(matmul.name))
    if unknown := sorted(set(formats or {}) - set(matmuls)):
        raise QuantiseError("E0809", "quantize", f"{unknown[0]} is no weight of a matmul", "take names from the report")
    return matmuls


def quantise_graphs(
    models: Mapping[str, ModelProto],
    recipe: Recipe,
    observations: Observations | None,
    formats: Mapping[str, str] | None = None,
    *,
    spill: Spill | None = None,
    progress: Callable[[int], None] = lambda elements: None,
) -> Quantised:
    """The graphs in the recipe's formats. `formats` overrides the format of single weights.

    spill: where large new initialisers go; None keeps them inside the graphs. progress: takes the number of weights
    quantised since the last call. Raises QuantiseError.
    """
    matmuls = choose_formats(models, recipe, observations, formats)
    groups = shared_inputs(matmuls.values())
    for group in groups:
        scale_inputs(group, recipe, observations)
    for matmul in matmuls.values():
        if matmul.format in LARGEST:
            matmul.quantised = quantise_weight(matmul, recipe, observations)
        progress(matmul.matrix.size)
    embeddings = find_tables(models, recipe, matmuls)
    rewritten: dict[str, ModelProto] = {}
    folded: dict[str, bool] = {}
    for name, model in models.items():
        rewriting = Rewriting(name, model, matmuls, embeddings, spill)
        rewriting.run()
        for weight, fold in rewriting.folded.items():
            folded[weight] = folded.get(weight, True) and fold
        check_structure(rewriting.model)
        rewritten[name] = rewriting.model
    report = GraphReport(
        matmuls={name: matmuls[name].format for name in sorted(matmuls)},
        kept={name: matmul.why for name, matmul in sorted(matmuls.items()) if matmul.format == FLOAT32},
        scaled={name: "folded" if fold else "node" for name, fold in sorted(folded.items())},
        embeddings={name: table.format for name, table in sorted(embeddings.items())},
    )
    return Quantised(rewritten, report)
