"""A bundle's graphs rewritten with explicit quantisation, in ONNX's own operators.

What is rewritten are products with a weight: MatMul and Gemm whose second input is an initialiser. The same weight gets
the same numbers and scales in every graph, and products of one input share its scale. docs/bundle.md has the forms.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

from ..engines.precision import to_bfloat16
from ..errors import TitansError
from .awq import awq_scales
from .gptq import gptq
from .smooth import smoothing
from .weights import LARGEST, QuantisedMatrix, pack_int4, quantise, scales_of

if TYPE_CHECKING:
    from .observe import Observations, Observed
    from .recipe import Recipe

OPSET = 21  # the first with int4 and with scales in blocks
SMALLEST = 4096  # elements: a smaller matrix costs more nodes than it saves bytes
BLOCKS = (128, 64, 32, 16)  # what one scale a channel is written in, without activations: kernels take blocks
FLOAT32 = "float32"
_CASTS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_ELEMENTS = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "fp8": TensorProto.FLOAT8E4M3FN}
_EXACT = (-1.0, 0.0, 1.0)


class QuantiseError(TitansError):
    """Graphs or observations that the rewriting cannot use."""


@dataclass(frozen=True)
class GraphReport:
    """What the rewriting did.

    products: format of each product's weight, float32 for those that stay. kept: why those stay. scaled: of each weight
    whose input is divided by factors, whether every graph has them in the norm before it ("folded") or in a node.
    """

    products: dict[str, str]
    kept: dict[str, str]
    scaled: dict[str, str]
    embeddings: dict[str, str]


@dataclass(frozen=True)
class Quantised:
    """The rewritten graphs, weights inside."""

    models: dict[str, ModelProto]
    report: GraphReport


@dataclass(frozen=True)
class _Use:
    """A product in a graph."""

    graph: str
    index: int  # of the node
    input: str
    transposed: bool  # Gemm's weights may be (N, K)


@dataclass
class _Product:
    """A weight (K, N) and everything that multiplies it."""

    name: str
    matrix: NDArray[np.float32]
    uses: list[_Use]
    format: str = FLOAT32
    group: int | None = None
    why: str = ""  # it stays float32
    leader: str = ""  # the first of the products that share its input
    factors: NDArray[np.float32] | None = None  # the input is divided by these
    input_scale: np.float32 | None = None
    quantised: QuantisedMatrix | None = None

    @property
    def transposed(self) -> bool:
        return self.uses[0].transposed


def product_weights(models: Mapping[str, ModelProto]) -> dict[str, tuple[int, int]]:
    """The weights of all products by name, each with K and N. What has another use as well is left out."""
    return {name: (len(p.matrix), p.matrix.shape[1]) for name, p in _find(models).items() if not p.why}


def quantise_graphs(
    models: Mapping[str, ModelProto],
    recipe: Recipe,
    observations: Observations | None,
    formats: Mapping[str, str] | None = None,
) -> Quantised:
    """The graphs as the recipe asks. `formats` overrules its weight format for the weights that it names.

    Raises QuantiseError.
    """
    products = _find(models)
    for product in products.values():
        _choose(product, recipe, observations, (formats or {}).get(product.name))
    if unknown := sorted(set(formats or {}) - set(products)):
        raise QuantiseError("quantize", "weights of products", unknown[0], "take names that the report lists")
    groups = _groups(products.values())
    for group in groups:
        _scale_inputs(group, recipe, observations)
    for product in products.values():
        if product.format in LARGEST:
            product.quantised = _quantise(product, recipe, observations)
    embeddings = _embeddings(models, recipe, products)
    rewritten: dict[str, ModelProto] = {}
    folded: dict[str, bool] = {}
    for name, model in models.items():
        rewriting = _Rewriting(name, model, products, embeddings)
        rewriting.run()
        for weight, fold in rewriting.folded.items():
            folded[weight] = folded.get(weight, True) and fold
        checker.check_model(rewriting.model)
        rewritten[name] = rewriting.model
    report = GraphReport(
        products={name: products[name].format for name in sorted(products)},
        kept={name: product.why for name, product in sorted(products.items()) if product.format == FLOAT32},
        scaled={name: "folded" if fold else "node" for name, fold in sorted(folded.items())},
        embeddings={name: table.format for name, table in sorted(embeddings.items())},
    )
    return Quantised(rewritten, report)


def _find(models: Mapping[str, ModelProto]) -> dict[str, _Product]:
    products: dict[str, _Product] = {}
    for graph, model in models.items():
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        others = _other_uses(model.graph)
        for index, node in enumerate(model.graph.node):
            if not _is_product(node) or node.input[1] not in weights:
                continue
            tensor = weights[node.input[1]]
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
                continue
            transposed = bool(_attribute(node, "transB", 0))
            if tensor.name not in products:
                matrix = numpy_helper.to_array(tensor)
                products[tensor.name] = _Product(tensor.name, matrix.T if transposed else matrix, [])
            product = products[tensor.name]
            product.uses.append(_Use(graph, index, node.input[0], transposed))
            if product.transposed != transposed or tensor.name in others or node.input[0] in weights:
                product.why = "it is not only the second factor of products"
            elif node.op_type == "Gemm" and not _is_plain(node):
                product.why = "a Gemm that also scales or transposes its input"
    for model in models.values():
        others = _other_uses(model.graph)
        for tensor in model.graph.initializer:
            known = products.get(tensor.name)
            if known is None:
                continue
            if tensor.name in others:
                known.why = "it is not only the second factor of products"
            matrix = numpy_helper.to_array(tensor)
            if not np.array_equal(matrix.T if known.transposed else matrix, known.matrix, equal_nan=True):
                raise QuantiseError(
                    "quantize", f"one {tensor.name} in all graphs", "two of different content", "export again"
                )
    return products


def _is_product(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm") and len(node.input) >= 2


def _is_plain(node: NodeProto) -> bool:
    return not _attribute(node, "transA", 0) and _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def _other_uses(graph: GraphProto) -> set[str]:
    """What is read by anything but products as their weight, branches and outputs included."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found.update(name for i, name in enumerate(node.input) if not (i == 1 and _is_product(node)))
        for entry in node.attribute:
            for inner in subgraphs(entry):
                found |= captured(inner)
    return found


def subgraphs(entry: AttributeProto) -> Iterator[GraphProto]:
    if entry.HasField("g"):
        yield entry.g
    yield from entry.graphs


def captured(graph: GraphProto) -> set[str]:
    found = {value.name for value in graph.output}
    for node in graph.node:
        found.update(node.input)
        for entry in node.attribute:
            for inner in subgraphs(entry):
                found |= captured(inner)
    return found


def _choose(product: _Product, recipe: Recipe, observations: Observations | None, format: str | None) -> None:
    """The product's format, or why it stays float32."""
    wanted = format or recipe.weights.format
    rows, columns = product.matrix.shape
    group = recipe.weights.group if wanted in LARGEST else None
    if product.why:
        return
    if format == FLOAT32 or recipe.weights.format == FLOAT32:
        product.why = "so chosen"
    elif any(fnmatch.fnmatchcase(product.name, pattern) for pattern in recipe.keep):
        product.why = "the recipe keeps it"
    elif rows * columns < SMALLEST:
        product.why = f"{rows}x{columns}: fewer than {SMALLEST} elements"
    elif np.isin(product.matrix, _EXACT).all():
        product.why = "only 0, 1 and -1: a permutation, exact as it is"
    elif not np.isfinite(product.matrix).all():
        raise QuantiseError("quantize", f"finite weights in {product.name}", "others", "mend the checkpoint")
    elif group is not None and rows % group:
        product.why = f"its {rows} input channels are no multiple of the group {group}"
    elif _by_data(recipe, wanted) and (observations is None or product.name not in observations):
        if observations is None:
            raise QuantiseError("quantize", f"observations, as the recipe {recipe.name} asks", "none", "give data")
        product.why = "the data never reached it"
    else:
        product.format, product.group = wanted, group


def _by_data(recipe: Recipe, format: str) -> bool:
    activations = recipe.activations is not None and format == recipe.activations.format
    return activations or recipe.smooth is not None or recipe.weights.method in ("awq", "gptq")


def _groups(products: Iterable[_Product]) -> list[list[_Product]]:
    """Products to quantise, those that share an input in some graph together, in the order of their names."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    chosen = {product.name: product for product in products if product.format in LARGEST}
    first: dict[tuple[str, str], str] = {}
    for name, product in chosen.items():
        for use in product.uses:
            other = first.setdefault((use.graph, use.input), name)
            # Of formats that differ, inputs are rounded differently.
            if chosen[other].format == product.format:
                leader[find(name)] = find(other)
    groups: dict[str, list[_Product]] = {}
    for name in sorted(chosen):
        groups.setdefault(find(name), []).append(chosen[name])
    return list(groups.values())


def _observed(group: Sequence[_Product], observations: Observations) -> Observed:
    merged = observations[group[0].name]
    for product in group[1:]:
        merged = merged.merged(observations[product.name])
    return merged


def _scale_inputs(group: Sequence[_Product], recipe: Recipe, observations: Observations | None) -> None:
    """Factors of the common input's channels, and its scale."""
    format = group[0].format
    activations = recipe.activations if recipe.activations and recipe.activations.format == format else None
    if observations is None or not (activations or recipe.weights.method == "awq"):
        return
    from .observe import activation_limit

    seen = _observed(group, observations)
    factors = None
    if activations and recipe.smooth is not None:
        factors = smoothing(seen.channels, [product.matrix for product in group], recipe.smooth)
    elif recipe.weights.method == "awq":
        matrices = [product.matrix for product in group]
        factors = awq_scales(seen.mean_abs, matrices, format, group[0].group, seen.gram)
    limit = 0.0
    if activations:
        limit = activation_limit(seen, activations.method, activations.percentile, int(LARGEST[format]))
        if factors is not None:
            # The histogram is of the input as it was: what it clips is taken off the new range by the same share.
            before = float(np.max(seen.channels, initial=0.0))
            after = float(np.max(seen.channels / factors, initial=0.0))
            limit = after * (limit / before if before else 1.0)
    for product in group:
        product.leader, product.factors = group[0].name, factors
        if activations:
            product.input_scale = np.float32(scales_of(np.float64(limit), format))


def _quantise(product: _Product, recipe: Recipe, observations: Observations | None) -> QuantisedMatrix:
    matrix, method = product.matrix, recipe.weights.method
    if product.factors is not None:
        matrix = matrix * product.factors[:, None]
    if method == "gptq":
        assert observations is not None
        gram = observations[product.name].gram
        if gram is None:
            raise QuantiseError("quantize", f"sums of x^T x of {product.name}", "none", "observe with the gram")
        if product.factors is not None:
            gram = gram / np.outer(product.factors, product.factors).astype(np.float64)
        return gptq(matrix, gram, product.format, product.group)
    return quantise(matrix, product.format, product.group, "mse" if method == "mse" else "minmax")


@dataclass(frozen=True)
class _Table:
    """An embedding as it will be."""

    format: str
    values: TensorProto
    scales: NDArray[np.float32] | None


def _embeddings(
    models: Mapping[str, ModelProto], recipe: Recipe, products: Mapping[str, _Product]
) -> dict[str, _Table]:
    """Tables that rows are gathered from and nothing else, in the recipe's format."""
    if recipe.embedding == FLOAT32:
        return {}
    found: dict[str, _Table] = {}
    refused = {name for name, product in products.items()}
    for model in models.values():
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        gathered = {node.input[0] for node in model.graph.node if _is_lookup(node)} & set(tensors)
        elsewhere = {value.name for value in model.graph.output}
        for node in model.graph.node:
            elsewhere.update(node.input[1:] if _is_lookup(node) else node.input)
            elsewhere.update(name for entry in node.attribute for g in subgraphs(entry) for name in captured(g))
        refused |= elsewhere
        for name in sorted(gathered - elsewhere):
            tensor = tensors[name]
            kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.keep)
            if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or kept or name in found:
                continue
            matrix = numpy_helper.to_array(tensor)
            if matrix.size >= SMALLEST:
                found[name] = _table(name, matrix, recipe.embedding)
    return {name: table for name, table in found.items() if name not in refused}


def _is_lookup(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type == "Gather" and _attribute(node, "axis", 0) == 0


def _table(name: str, matrix: NDArray[np.float32], format: str) -> _Table:
    if format == "float16":
        return _Table(format, _cast_weight(f"{name}.float16", matrix, format), None)
    quantised = quantise(matrix, format, None, "minmax")
    values = helper.make_tensor(
        f"{name}.int8", TensorProto.INT8, matrix.shape, np.ascontiguousarray(quantised.values).tobytes(), raw=True
    )
    return _Table(format, values, quantised.scales[0])


def _cast_weight(name: str, matrix: NDArray[np.float32], format: str) -> TensorProto:
    if format == "float16":
        largest = float(np.abs(matrix).max(initial=0.0))
        if not largest <= float(np.finfo(np.float16).max):
            raise QuantiseError(
                "quantize", f"weights within 65504, which float16 holds, in {name.rpartition('.')[0]}", f"{largest:g}",
                "take bfloat16, or keep it float32",
            )  # fmt: skip
        raw = matrix.astype(np.float16).tobytes()
    else:
        raw = to_bfloat16(matrix).tobytes()
    return helper.make_tensor(name, _CASTS[format], matrix.shape, raw, raw=True)


def block_of(rows: int) -> int | None:
    """The block in which one scale a channel is written where activations stay float; None where none fits."""
    return next((block for block in BLOCKS if rows % block == 0), None)


@dataclass
class _Rewriting:
    """One graph's."""

    name: str
    source: ModelProto
    products: Mapping[str, _Product]
    embeddings: Mapping[str, _Table]
    model: ModelProto = field(init=False)
    folded: dict[str, bool] = field(default_factory=dict)

    def run(self) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(self.source)
        graph = self.model.graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info)
            if value.type.tensor_type.HasField("shape")
        }
        self.captured = _other_uses(graph) - {name for node in graph.node for name in node.input}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.taken = set(self.weights) | set(self.makers) | {value.name for value in graph.input}
        self.added: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.made: dict[tuple[str, ...], str] = {}  # what has been computed for a value already
        uses = {use.index: product for product in self.products.values() for use in product.uses
                if use.graph == self.name and product.format != FLOAT32}  # fmt: skip
        self._fold(graph, uses)
        biased: dict[str, NodeProto] = {}
        for index, node in enumerate(graph.node):
            if index in uses:
                self._product(node, uses[index])
                if uses[index].format in LARGEST and node.op_type == "MatMul":
                    biased[node.output[0]] = node
            elif node.op_type == "Add" and node.domain == "" and set(node.input) & set(biased):
                self._bias(node, biased)
            elif _is_lookup(node) and node.input[0] in self.embeddings:
                self._lookup(node, self.embeddings[node.input[0]])
            else:
                self.nodes.append(node)
        self._replace(graph)
        _raise_opset(self.model)

    def _fold(self, graph: GraphProto, uses: Mapping[int, _Product]) -> None:
        """Factors into the initialiser of the Mul that makes the input, where all its readers are these products."""
        scaled: dict[str, _Product] = {}
        for index, product in uses.items():
            if product.factors is not None:
                scaled.setdefault(graph.node[index].input[0], product)
        self.in_norm: set[str] = set()
        outputs = {value.name for value in graph.output}
        for value, product in scaled.items():
            assert product.factors is not None
            maker = self.makers.get(value)
            readers = self.readers[value]
            ours = [uses.get(i) for i, node in enumerate(graph.node) if value in node.input and node.input[0] == value]
            alone = len(ours) == len(readers) and all(
                other is not None and other.leader == product.leader for other in ours
            )
            fold = False
            if maker is not None and maker.op_type == "Mul" and alone and value not in self.captured | outputs:
                fold = self._fold_into(maker, product)
            if fold:
                self.in_norm.add(value)
            for other in uses.values():
                if other.leader == product.leader:
                    self.folded[other.name] = self.folded.get(other.name, True) and fold

    def _fold_into(self, node: NodeProto, product: _Product) -> bool:
        assert product.factors is not None
        for place, name in enumerate(node.input):
            tensor = self.weights.get(name)
            if tensor is None or tensor.data_type != TensorProto.FLOAT or not tensor.dims:
                continue
            if tensor.dims[-1] != len(product.factors) or int(np.prod(tensor.dims)) != len(product.factors):
                continue
            value = numpy_helper.to_array(tensor)
            key = (name, "norm", product.leader)
            if key not in self.made:
                scaled = (value.astype(np.float64) / product.factors).astype(np.float32)
                self.made[key] = self._add(numpy_helper.from_array(scaled, f"divided.{product.leader}.{name}"))
            node.input[place] = self.made[key]
            return True
        return False

    def _product(self, node: NodeProto, product: _Product) -> None:
        if product.format in _CASTS:
            node.input[1] = self._cast(product)
            self.nodes.append(node)
            return
        value = node.input[0]
        if product.factors is not None and value not in self.in_norm:
            value = self._divided(value, product)
        if product.input_scale is not None:
            value = self._rounded(value, product)
        node.input[0] = value
        node.input[1] = self._dequantised(product)
        self.nodes.append(node)

    def _bias(self, node: NodeProto, products: Mapping[str, NodeProto]) -> None:
        """A bias after a product gets three dimensions: with fewer ONNX Runtime makes a Gemm of both before it looks
        for quantised products, and then dequantises the whole weight in every call.
        """
        place = 0 if node.input[0] in products else 1
        product, bias = node.input[place], self.weights.get(node.input[1 - place])
        rank = self.ranks.get(product)
        if bias is None or rank is None or rank < 2 or len(bias.dims) != 1:
            self.nodes.append(node)
            return
        key = (bias.name, "bias")
        if key not in self.made:
            value = numpy_helper.to_array(bias)
            self.made[key] = self._add(numpy_helper.from_array(value.reshape(1, 1, -1), f"{bias.name}.row"))
        node.input[1 - place] = self.made[key]
        self.nodes.append(node)
        if rank == 2:
            if ("zeroth", "axis") not in self.made:
                axis = numpy_helper.from_array(np.zeros(1, np.int64), "axis.0")
                self.made["zeroth", "axis"] = self._add(axis)
            output, node.output[0] = node.output[0], f"{node.output[0]}.row"
            self.nodes.append(
                helper.make_node("Squeeze", [node.output[0], self.made["zeroth", "axis"]], [output], name=output)
            )

    def _cast(self, product: _Product) -> str:
        key = (product.name, "cast")
        if key not in self.made:
            name = f"{product.name}.{product.format}"
            matrix = product.matrix.T if product.transposed else product.matrix
            self._add(_cast_weight(name, np.ascontiguousarray(matrix), product.format))
            self.made[key] = self._node("Cast", [name], f"{product.name}.cast", to=TensorProto.FLOAT)
        return self.made[key]

    def _divided(self, value: str, product: _Product) -> str:
        assert product.factors is not None
        key = (value, "divided", product.leader)
        if key not in self.made:
            inverse = (1.0 / product.factors.astype(np.float64)).astype(np.float32)
            factor = self._add(numpy_helper.from_array(inverse, f"{product.leader}.input_factors"))
            self.made[key] = self._node("Mul", [value, factor], f"{value}.divided")
        return self.made[key]

    def _rounded(self, value: str, product: _Product) -> str:
        """Rounded for each product on its own, though products of an input round alike: where several share a rounding,
        ONNX Runtime's rewrites for x86 leave them as they are, and dequantise whole weights in every call.
        """
        assert product.input_scale is not None
        scale = numpy_helper.from_array(np.array(product.input_scale), f"{product.leader}.input_scale")
        inputs = [self._add(scale), self._zero(product.format)]
        rounded = self._node("QuantizeLinear", [value, *inputs], f"{value}.{product.format}")
        return self._node("DequantizeLinear", [rounded, *inputs], f"{value}.dequantised")

    def _zero(self, format: str) -> str:
        key = (format, "zero")
        if key not in self.made:
            tensor = helper.make_tensor(f"zero.{format}", _ELEMENTS[format], [], b"\0", raw=True)
            self.made[key] = self._add(tensor)
        return self.made[key]

    def _dequantised(self, product: _Product) -> str:
        key = (product.name, "weight")
        if key in self.made:
            return self.made[key]
        quantised = product.quantised
        assert quantised is not None
        values, scales, block = quantised.values, quantised.scales, product.group
        if block is None and product.input_scale is None and product.format != "fp8":
            block = block_of(len(values))
            scales = np.repeat(scales, len(values) // block, axis=0) if block else scales
        axis = 0 if block else 1
        if product.transposed:
            values, scales, axis = values.T, scales.T, 1 - axis
        shape = values.shape
        data = np.ascontiguousarray(values)
        raw = pack_int4(data.astype(np.int8)) if product.format == "int4" else data.tobytes()
        stem = f"{product.name}.{product.format}"
        weight = self._add(helper.make_tensor(stem, _ELEMENTS[product.format], shape, raw, raw=True))
        scale = np.ascontiguousarray(scales if block else scales.reshape(-1))
        inputs = [weight, self._add(numpy_helper.from_array(scale, f"{stem}.scale"))]
        if product.input_scale is not None:
            inputs.append(self._weight_zeros(product, scale))
        attributes = {"axis": axis, "block_size": block} if block else {"axis": axis}
        self.made[key] = self._node("DequantizeLinear", inputs, f"{product.name}.dequantised", **attributes)
        return self.made[key]

    def _weight_zeros(self, product: _Product, scale: NDArray[np.float32]) -> str:
        key = (product.format, "zeros", str(len(scale)))
        if key not in self.made:
            name = f"zeros.{product.format}.{len(scale)}"
            tensor = helper.make_tensor(name, _ELEMENTS[product.format], scale.shape, bytes(len(scale)), raw=True)
            self.made[key] = self._add(tensor)
        return self.made[key]

    def _lookup(self, node: NodeProto, table: _Table) -> None:
        source, output = node.input[0], node.output[0]
        if table.values.name not in self.added:
            self._add(table.values)
        node.input[0] = table.values.name
        node.output[0] = f"{output}.{table.format}"
        self.nodes.append(node)
        if table.scales is None:
            self.nodes.append(helper.make_node("Cast", [node.output[0]], [output], name=output, to=TensorProto.FLOAT))
            return
        key = (source, "scale")
        if key not in self.made:
            self.made[key] = self._add(numpy_helper.from_array(table.scales, f"{table.values.name}.scale"))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [node.output[0], self.made[key]], [output], name=output, axis=-1)
        )

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = output
        number = 1
        while name in self.taken:
            number += 1
            name = f"{output}.{number}"
        self.taken.add(name)
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _add(self, tensor: TensorProto) -> str:
        known = self.added.get(tensor.name)
        if known is None and tensor.name in self.taken:
            expected = f"no value {tensor.name} in {self.name}"
            raise QuantiseError("quantize", expected, "one", "give a bundle in float32")
        assert known is None or known == tensor
        self.taken.add(tensor.name)
        self.added[tensor.name] = tensor
        return str(tensor.name)

    def _replace(self, graph: GraphProto) -> None:
        """The new nodes, and only the initialisers that are still read."""
        copies = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del graph.node[:]
        graph.node.extend(copies)
        used = captured(graph)
        kept = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self.added.values()])


def _raise_opset(model: ModelProto) -> None:
    """The graph and its functions in opset 21: from 20 to 21 operators in use here gained types and changed nothing."""
    for entries in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in entries:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSET)
