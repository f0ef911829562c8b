"""The options, from the tensors where they determine them, else from the arguments. The two are compared."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ...errors import CheckpointError
from ...model.titans_pytorch.options import MemoryOptions, NetworkOptions, TransformerOptions
from .config import ACTIVATIONS, DEFAULT_NETWORK, KWARGS, NETWORKS, Config, Kind, correct, network_key
from .infer import Found, FoundNetwork, View, infer_memory, infer_transformer
from .layout import MEMORY, Shapes, layer_prefix

# Defaults of arguments that the tensors do not determine. Others have no default.
_DEFAULTS: dict[str, Any] = {
    "chunk_size": 1,
    "batch_size": None,
    "qkv_receives_diff_views": False,
    "default_step_transform_max_lr": 1.0,
    "max_mem_layer_modulation": 1.0,
    "max_grad_norm": None,
    "spectral_norm_surprises": False,
    "store_with_lookahead_value": False,
    "neural_memory_segment_len": None,
    "neural_memory_batch_size": None,
    "sliding_window_attn": False,
    "neural_mem_gate_attn_output": False,
}


class Answers:
    """Looks up each argument, and collects all missing ones for a single error."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.missing: list[str] = []

    def given(self, key: str, otherwise: Any = None) -> Any:
        return self.config.given.get(key, otherwise)

    def agree(self, key: str, found: Found, wanted: Any = None) -> Any:
        """The found value. wanted: the given one in the form of the found one, if their forms differ."""
        if key in self.config.given:
            value = self.given(key)
            if (value if wanted is None else wanted) != found.value:
                self.contradict(key, value, found)
        return found.value

    def contradict(self, key: str, value: Any, found: Found) -> None:
        shown = list(found.value) if isinstance(found.value, tuple) else found.value
        raise CheckpointError(
            "E0310",
            "config",
            f"{key} contradicts the tensors: expected {json.dumps(shown)}, as {found.evidence}, "
            f"got {json.dumps(value)} in {self.config.name}",
            f"correct {self.config.name} or give the checkpoint that it describes",
        )

    def need(self, key: str) -> Any:
        """The given value, else the library's default if the user asked for it, else None, which `finish` reports."""
        if key in self.config.given:
            return self.given(key)
        argument = key.rpartition(".")[2]
        if self.config.library_defaults and argument in _DEFAULTS:
            self.config.filled[key] = self._default(argument)
            return self.config.filled[key]
        self.missing.append(key)
        return None

    def finish(self) -> None:
        if not self.missing:
            return
        defaults: dict[str, Any] = {}
        bare = []
        for key in self.missing:
            scope, _, argument = key.rpartition(".")
            if argument not in _DEFAULTS:
                bare.append(key + _HINTS.get(argument, ""))
                continue
            inner = defaults.setdefault(scope, {}) if scope else defaults
            inner[argument] = self._default(argument)
        fix = "add the values of the training"
        if defaults:
            fix += f"; the library's defaults are {json.dumps(defaults)}, which --library-defaults takes"
        if bare:
            fix += f"; without a default: {', '.join(bare)}"
        saved = {
            key: value for key in self.missing if (value := self.config.saved.get(key.rpartition(".")[2])) is not None
        }
        if saved:
            fix += f"; the checkpoint holds {json.dumps(saved)}, if these are the model's"
        problem = f"{self.config.name} lacks arguments that the tensors do not determine: {', '.join(self.missing)}"
        raise CheckpointError("E0311", "config", problem, fix)

    def _default(self, argument: str) -> Any:
        if argument == "store_with_lookahead_value" and self.config.json.get("version") == "0.5.2":
            return True  # in that one version
        return _DEFAULTS[argument]


_HINTS = {
    "activation": f" (one of {', '.join(ACTIVATIONS)})",
    "model": " (the tensors fit MemoryMLP and MemoryAttention)",
    "neural_memory_model": " (the tensors fit MemoryMLP and MemoryAttention)",
}


def resolve_memory(config: Config, shapes: Shapes) -> MemoryOptions:
    """The options of a bare NeuralMemory."""
    answers = Answers(config)
    options = _memory(answers, View(shapes), "memory")
    answers.finish()
    return _checked(options, config, "")


def resolve_transformer(config: Config, shapes: Shapes) -> tuple[TransformerOptions, MemoryOptions]:
    """The options of a MemoryAsContextTransformer, and of its first memory layer, without a weight residual."""
    answers = Answers(config)
    found = infer_transformer(View(shapes))
    values = {key: answers.agree(key, found[key]) for key in found if key not in ("neural_memory_layers", "ff_hidden")}
    dim, depth = values["dim"], values["depth"]
    layers, inner = found["neural_memory_layers"], found["ff_hidden"]
    if "neural_memory_layers" in config.given:
        every = range(1, depth + 1)
        wanted = config.given["neural_memory_layers"]
        answers.agree("neural_memory_layers", layers, tuple(i for i in every if wanted is None or i in wanted))
    if (mult := config.given.get("ff_mult")) is not None and int(dim * mult * 2 / 3) != inner.value:
        raise CheckpointError(
            "E0310",
            "config",
            f"ff_mult contradicts the tensors: expected int(dim * ff_mult * 2 / 3) to be {inner.value}, "
            f"as {inner.evidence}, got {int(dim * mult * 2 / 3)} for {mult} in {config.name}",
            f"correct {config.name}",
        )
    segment, sliding = answers.need("segment_len"), answers.need("sliding_window_attn")
    memory = _memory(answers, View(shapes, layer_prefix(layers.value[0], MEMORY)), "transformer")
    gate = values.get("neural_mem_gate_attn_output")
    if gate is None:  # only hyper-connections determine it
        gate = answers.need("neural_mem_gate_attn_output")
    answers.finish()
    longterm = values["num_longterm_mem_tokens"]
    if memory.chunk_size is None:
        memory = dataclasses.replace(memory, chunk_size=segment + longterm)
    memory = _checked(memory, config, f"{KWARGS}.")
    _check_head(values["dim_head"], config)
    residual = values.get("neural_mem_weight_residual", False)
    options = TransformerOptions(
        num_tokens=values["num_tokens"],
        dim=dim,
        depth=depth,
        segment_len=segment,
        num_longterm_mem_tokens=longterm,
        num_persist_mem_tokens=values["num_persist_mem_tokens"],
        dim_head=values["dim_head"],
        heads=values["heads"],
        ff_hidden=inner.value,
        num_residual_streams=values["num_residual_streams"],
        neural_memory_layers=layers.value,
        sliding_window_attn=sliding,
        neural_mem_gate_attn_output=gate,
        neural_mem_weight_residual=residual,
        neural_memory_qkv_receives_diff_views=values.get("neural_memory_qkv_receives_diff_views", False),
        memory=dataclasses.replace(memory, accept_weight_residual=residual),
    )
    return options, memory


def _memory(answers: Answers, view: View, kind: Kind) -> MemoryOptions:
    """The memory's options. A transformer's chunk_size is None if it follows from the segment."""
    bare = kind == "memory"
    prefix = "" if bare else f"{KWARGS}."
    found, network = infer_memory(view)
    activated = found.pop("activated")
    dim_head = found["dim_head"]
    if f"{prefix}dim_head" in answers.config.given and answers.given(f"{prefix}dim_head") is None:
        answers.agree(f"{prefix}dim_head", dim_head, found["dim"].value)
    for key, value in found.items():
        null_head = key == "dim_head" and answers.given(f"{prefix}dim_head") is None
        if not null_head and (bare or key not in ("dim", "accept_weight_residual")):  # set by the transformer
            answers.agree(prefix + key, value)
    values = {key: value.value for key, value in found.items()}
    momentum, combine = values["momentum"], values["learned_momentum_combine"]
    activation = None
    if activated.value:
        if f"{prefix}activation" in answers.config.given and answers.given(f"{prefix}activation") is None:
            answers.contradict(f"{prefix}activation", None, Found("one", activated.evidence))
        activation = answers.need(f"{prefix}activation")
    elif answers.given(f"{prefix}activation") is not None:
        said = answers.given(f"{prefix}activation")
        answers.contradict(f"{prefix}activation", said, Found(None, activated.evidence))
    modulated = values["per_parameter_lr_modulation"]
    return MemoryOptions(
        dim=values["dim"],
        chunk_size=answers.need("chunk_size" if bare else "neural_memory_segment_len"),
        batch_size=answers.need("batch_size" if bare else "neural_memory_batch_size"),
        dim_head=dim_head.value,
        heads=values["heads"],
        network=_network(answers, network, dim_head, kind),
        default_step_transform_max_lr=answers.need(f"{prefix}default_step_transform_max_lr"),
        per_parameter_lr_modulation=modulated,
        max_mem_layer_modulation=answers.need(f"{prefix}max_mem_layer_modulation") if modulated else 1.0,
        per_head_learned_parameters=values["per_head_learned_parameters"],
        attn_pool_chunks=values["attn_pool_chunks"],
        momentum=momentum,
        momentum_order=values["momentum_order"] if momentum else 1,
        learned_momentum_combine=combine,
        learned_combine_include_zeroth=values.get("learned_combine_include_zeroth", False),
        num_kv_per_token=values["num_kv_per_token"],
        qkv_receives_diff_views=answers.need("qkv_receives_diff_views") if bare else True,
        pre_rmsnorm=values["pre_rmsnorm"],
        post_rmsnorm=values["post_rmsnorm"],
        qk_rmsnorm=values["qk_rmsnorm"],
        max_grad_norm=answers.need(f"{prefix}max_grad_norm"),
        activation=activation,
        accept_weight_residual=values["accept_weight_residual"],
        spectral_norm_surprises=answers.need(f"{prefix}spectral_norm_surprises"),
        gated_transition=values["gated_transition"],
        mem_model_norm_add_residual=values["mem_model_norm_add_residual"],
        store_with_lookahead_value=answers.need(f"{prefix}store_with_lookahead_value"),
    )


def _network(answers: Answers, found: FoundNetwork, dim_head: Found, kind: Kind) -> NetworkOptions:
    key, given = network_key(kind), answers.config.given
    kwargs_key = "default_model_kwargs" if kind == "memory" else f"{KWARGS}.default_model_kwargs"
    spec, name = given.get(key), key
    if spec is None and (key in given or kwargs_key in given):
        spec, name = {"type": "MemoryMLP", **given.get(kwargs_key, DEFAULT_NETWORK)}, kwargs_key
    if spec is None and found.kind is None:
        answers.missing.append(key)
    if spec is not None:
        named = NETWORKS[spec["type"]]
        spec = named.defaults | spec
        evidence = found.evidence
        if found.kind is not None and named.kind != found.kind:
            fits = next(name for name, network in NETWORKS.items() if network.kind == found.kind)
            answers.contradict(f"{name}.type", spec["type"], Found(fits, evidence))
        for part, value in (("dim", dim_head), ("depth", Found(found.depth, evidence))):
            if part in spec and spec[part] != value.value:
                answers.contradict(f"{name}.{part}", spec[part], value)
        hidden = _hidden(spec, dim_head.value)
        if hidden != found.hidden and not (named.kind == "mlp" and found.depth == 1):
            raise CheckpointError(
                "E0310",
                "config",
                f"{name}.{named.width} contradicts the tensors: expected an inner width of {found.hidden}, "
                f"as {evidence}, got {hidden} for {spec[named.width]} in {answers.config.name}, or by default",
                f"correct {answers.config.name}",
            )
    return NetworkOptions(found.kind or "mlp", found.depth, found.hidden)


def _hidden(spec: dict[str, Any], dim_head: int) -> int:
    if "k" in spec:
        return int(spec["k"])
    factor = spec["expansion_factor"]
    return int(dim_head * factor * 2 / 3) if spec["type"] == "MemorySwiGluMLP" else int(dim_head * factor)


def _checked(memory: MemoryOptions, config: Config, prefix: str) -> MemoryOptions:
    """Refuses options for which the library fails."""
    chunk, batch = ("neural_memory_segment_len", "neural_memory_batch_size") if prefix else ("chunk_size", "batch_size")
    if memory.batch_size is not None and memory.batch_size % memory.chunk_size:
        problem = f"{batch}: expected a multiple of {chunk}, {memory.chunk_size}, got {memory.batch_size}"
        raise correct(f"{problem} in {config.name} (the library fails too)", config.name)
    if memory.attn_pool_chunks and memory.chunk_size == 1:
        problem = f"{chunk}: expected more than 1 with {prefix}attn_pool_chunks, got 1"
        raise correct(f"{problem} in {config.name} (the library fails too)", config.name)
    if memory.learned_momentum_combine and memory.momentum_order < 2:
        raise CheckpointError(
            "E0304",
            "checkpoint",
            f"{prefix}learned_momentum_combine: expected tensors of momentum order 2 or more, "
            f"got order {memory.momentum_order}",
            "give an unchanged state dict, as the library cannot make this one",
        )
    if memory.heads == 1 and memory.dim_head != memory.dim:
        raise CheckpointError(
            "E0304",
            "checkpoint",
            f"{prefix}dim_head of the tensors: expected dim, {memory.dim}, as {prefix}heads is 1, "
            f"got {memory.dim_head}",
            "give an unchanged state dict, as the library cannot make this one",
        )
    return memory


def _check_head(dim_head: int, config: Config) -> None:
    if dim_head % 2 or dim_head < 4:
        problem = f"unsupported dim_head: expected an even number of at least 4, got {dim_head}"
        raise CheckpointError("E0312", "checkpoint", problem, "train with another one")
