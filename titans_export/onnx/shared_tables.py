"""Makes torch.onnx.export faster, with the same nodes: for each trace it repeats what one process needs once.

All of this replaces private functions of PyTorch and onnxscript. In a version without one of them, that part is slower.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import getitem
from typing import Any
from unittest import mock

import torch


def _private(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@lru_cache
def _registry(make: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Any:
    return make(**dict(options))


@lru_cache(maxsize=8)
def _decompositions(make: Callable[..., Any], implemented: frozenset[Any], operators: int) -> dict[Any, Any]:
    return dict(make(set(implemented)))


def _shared_registry(make: Callable[..., Any]) -> Any:
    return staticmethod(lambda **options: _registry(make, tuple(options.items())))


def _shared_decompositions(make: Callable[..., Any]) -> Any:
    # The table covers the operators of all libraries, and an import may add some.
    operators = len(torch._C._dispatch_get_all_op_names())
    return lambda implemented: dict(_decompositions(make, frozenset(implemented), operators))


def _filtered_rewrite(rewrite: Callable[..., Any]) -> Any:
    """Tries a rule only for nodes of its operator. Some rules of onnxscript list the whole graph before they look."""

    def filtered(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        outputs = getattr(getattr(rule, "_target_pattern", None), "output_nodes", None)
        operator = getattr(outputs[0], "op", None) if outputs else None
        if operator is not None and not operator.matches(node.op_type):
            return None
        return rewrite(rule, model, graph, node, **options)

    return filtered


def _is_final(program: Any, implemented: set[Any]) -> bool:
    """Whether each operator of the program has an ONNX form of its own and writes to no input."""
    hooks = ("cond", "scan")
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            target = node.target
            if node.op != "call_function" or target in (getitem, torch.ops.aten._assert_tensor_metadata.default):
                continue
            if isinstance(target, torch._ops.HigherOrderOperator):
                final = target.name() in hooks
            else:
                final = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
                final = final and (target in implemented or target.namespace == "onnx_symbolic")
            if not final:
                return False
    return True


def _needed_decomposition(decompose: Callable[..., Any]) -> Any:
    """Leaves a program as it is if nothing in it is to be decomposed: to trace it again takes as long as the first."""

    def needed(program: Any, registry: Any) -> Any:
        implemented = {metas[0].fx_target for metas in registry.functions.values()}
        return program if _is_final(program, implemented) else decompose(program, registry)

    return needed


# Module, class, function, and what makes its replacement.
_REPLACED: tuple[tuple[str, str | None, str, Callable[[Callable[..., Any]], Any]], ...] = (
    ("torch.onnx._internal.exporter._registration", "ONNXRegistry", "from_torchlib", _shared_registry),
    ("torch.onnx._internal.exporter._decomp", None, "create_onnx_friendly_decomposition_table", _shared_decompositions),
    ("torch.onnx._internal.exporter._fx_passes", None, "decompose_with_registry", _needed_decomposition),
    ("torch._export.utils", None, "_materialize_cpp_cia_ops", lru_cache),  # once per trace
    ("onnxscript.rewriter._rewrite_rule", "RewriteRule", "try_rewrite", _filtered_rewrite),
)


@contextlib.contextmanager
def shared_tables() -> Iterator[None]:
    """Within it, exports of this process share the table of ONNX operators, which takes longer than a small export."""
    with contextlib.ExitStack() as patches:
        for module, owner, name, replace in _REPLACED:
            found = _private(module)
            place = getattr(found, owner, None) if owner else found
            if hasattr(place, name):
                patches.enter_context(mock.patch.object(place, name, replace(getattr(place, name))))
        yield
