"""State dicts of titans-pytorch itself, saved in every way: options read back, and refusals that say what to do."""

from __future__ import annotations

import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn

from titans_export.checkpoints import LoadOptions
from titans_export.checkpoints.titans_pytorch import Source, from_module, read
from titans_export.checkpoints.titans_pytorch.source import assemble
from titans_export.errors import CheckpointError
from titans_export.model.titans_pytorch.options import MemoryOptions, NetworkOptions, TransformerOptions

library = pytest.importorskip(
    "titans_pytorch", reason="titans-pytorch is not installed: pip install 'titans-export[bench]'"
)

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
NETWORKS: list[tuple[dict[str, Any] | None, tuple[str, int, Callable[[int], int]]]] = [
    (None, ("mlp", 2, lambda dim: 4 * dim)),
    ({"type": "MemoryMLP", "depth": 1}, ("mlp", 1, lambda dim: dim)),
    ({"type": "MemoryMLP", "depth": 3}, ("mlp", 3, lambda dim: 2 * dim)),
    (
        {"type": "GatedResidualMemoryMLP", "depth": 2, "expansion_factor": 1.5},
        ("gated-residual", 2, lambda dim: int(dim * 1.5)),
    ),
    ({"type": "FactorizedMemoryMLP", "depth": 2, "k": 3}, ("factorized", 2, lambda dim: 3)),
    ({"type": "MemorySwiGluMLP"}, ("swiglu", 1, lambda dim: int(dim * 8 / 3))),
    ({"type": "MemorySwiGluMLP", "depth": 2, "expansion_factor": 2.0}, ("swiglu", 2, lambda dim: int(dim * 4 / 3))),
]
TRANSFORMER = {"num_tokens": 11, "dim": 8, "depth": 2, "segment_len": 4, "heads": 2, "dim_head": 4}
# What of a bare memory, of a transformer and of a transformer's memory no tensor shows.
HIDDEN = {
    "default_step_transform_max_lr": 1.0,
    "max_grad_norm": None,
    "spectral_norm_surprises": False,
    "store_with_lookahead_value": False,
}
HIDDEN_MEMORY = HIDDEN | {"chunk_size": 4, "batch_size": None, "qkv_receives_diff_views": False}
HIDDEN_TRANSFORMER: dict[str, Any] = {
    "segment_len": 4,
    "neural_memory_segment_len": None,
    "neural_memory_batch_size": None,
    "sliding_window_attn": False,
    "neural_memory_kwargs": HIDDEN,
}


def make_network(spec: dict[str, Any] | None, dim: int) -> nn.Module | None:
    if spec is None:
        return None
    arguments = {key: value for key, value in spec.items() if key != "type"}
    return getattr(library, spec["type"])(dim=dim, **arguments)


def make_memory(network: dict[str, Any] | None = None, **arguments: Any) -> nn.Module:
    arguments = {"dim": 8, "chunk_size": 4} | arguments
    if name := arguments.get("activation"):
        arguments["activation"] = ACTIVATIONS[name]()
    return library.NeuralMemory(model=make_network(network, arguments.get("dim_head") or arguments["dim"]), **arguments)


def make_transformer(network: dict[str, Any] | None = None, **arguments: Any) -> nn.Module:
    arguments = TRANSFORMER | {"neural_memory_kwargs": {}} | arguments
    kwargs = dict(arguments["neural_memory_kwargs"])
    if name := kwargs.get("activation"):
        kwargs["activation"] = ACTIVATIONS[name]()
    arguments["neural_memory_kwargs"] = kwargs
    return library.MemoryAsContextTransformer(
        neural_memory_model=make_network(network, kwargs.get("dim_head") or arguments["dim"]), **arguments
    )


def random_memory(chance: random.Random) -> dict[str, Any]:
    """NeuralMemory's arguments that a transformer passes on, none of them ones on which the library fails."""
    flag = lambda: chance.random() < 0.5  # noqa: E731
    heads = chance.choice([1, 2, 3])
    order = chance.choice([1, 2, 3])
    momentum = chance.random() < 0.75
    combine = momentum and order > 1 and flag()
    return {
        "heads": heads,
        "dim_head": chance.choice([4, 6, None]) if heads > 1 else chance.choice([8, None]),
        "default_step_transform_max_lr": chance.choice([0.1, 1.0, 2]),
        "per_parameter_lr_modulation": flag(),
        "max_mem_layer_modulation": chance.choice([1.0, 10.0]),
        "per_head_learned_parameters": flag(),
        "attn_pool_chunks": flag(),
        "momentum": momentum,
        "momentum_order": order if momentum else 1,
        "learned_momentum_combine": combine,
        "learned_combine_include_zeroth": combine and flag(),
        "num_kv_per_token": chance.choice([1, 2]),
        "pre_rmsnorm": flag(),
        "post_rmsnorm": flag(),
        "qk_rmsnorm": flag(),
        "max_grad_norm": chance.choice([None, 0.5]),
        "activation": chance.choice([None, *ACTIVATIONS]),
        "spectral_norm_surprises": flag(),
        "gated_transition": flag(),
        "mem_model_norm_add_residual": flag(),
        "store_with_lookahead_value": flag(),
    }


def memory_options(arguments: dict[str, Any], network: int, **others: Any) -> MemoryOptions:
    """What the arguments say, by the library's source."""
    kind, depth, hidden = NETWORKS[network][1]
    dim_head = arguments["dim_head"] or 8
    said = arguments | others | {"dim": 8, "dim_head": dim_head}
    if not said["per_parameter_lr_modulation"]:
        said["max_mem_layer_modulation"] = 1.0  # multiplies nothing then
    return MemoryOptions(network=NetworkOptions(kind, depth, hidden(dim_head)), **said)  # type: ignore[arg-type]


def hidden_only(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a memory's arguments that no tensor shows."""
    keys = [*HIDDEN]
    keys += ["activation"] * bool(arguments["activation"])
    keys += ["max_mem_layer_modulation"] * arguments["per_parameter_lr_modulation"]
    return {key: arguments[key] for key in keys}


def read_with(folder: Path, module: nn.Module | dict[str, Any], config: dict[str, Any] | str | None) -> Source:
    """Reads what torch.save wrote; of a module its state dict."""
    saved, described = folder / "model.pt", folder / "model.json"
    torch.save(module.state_dict() if isinstance(module, nn.Module) else module, saved)
    if isinstance(config, dict):
        described.write_text(json.dumps(config))
        return read(saved, described)
    return read(saved, config)


def refusal(*arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_with(*arguments)
    message = str(caught.value)
    assert re.fullmatch(r"\[\w+\] .+[^.]\. Fix: .+ \(TITANS-E03\d\d\)", message), message
    return message


@pytest.mark.parametrize("seed", range(28))
def test_memory_options_are_read_back(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    arguments = random_memory(chance)
    others = {
        "chunk_size": chance.choice([2, 4]),
        "batch_size": chance.choice([None, 8]),
        "qkv_receives_diff_views": chance.random() < 0.5,
        "accept_weight_residual": chance.random() < 0.5,
    }
    network = seed % len(NETWORKS)
    module = make_memory(NETWORKS[network][0], **arguments, **others)
    expected = memory_options(arguments, network, **others)
    live = from_module(module)
    assert (live.kind, live.options) == ("memory", expected)
    del others["accept_weight_residual"]
    source = read_with(tmp_path, module, hidden_only(arguments) | others)
    assert (source.kind, source.options) == ("memory", expected)
    everything = arguments | others | {"dim": 8, "model": NETWORKS[network][0], "class": "NeuralMemory"}
    assert read_with(tmp_path, module, everything).options == expected
    same_tensors(source, module)
    same_tensors(live, module)


@pytest.mark.parametrize("seed", range(28))
def test_transformer_options_are_read_back(seed: int, tmp_path: Path) -> None:
    chance = random.Random(1000 + seed)
    memory = random_memory(chance)
    flag = lambda: chance.random() < 0.5  # noqa: E731
    layers = chance.choice([None, (1, 2, 3), (1, 3), (2,), (2, 3, 9)])
    segment, longterm = chance.choice([3, 4]), chance.choice([0, 2])
    arguments: dict[str, Any] = {
        "num_tokens": 13,
        "dim": 8,
        "depth": 3,
        "segment_len": segment,
        "neural_memory_segment_len": chance.choice([None, 2, 4]),
        "neural_mem_gate_attn_output": flag(),
        "num_longterm_mem_tokens": longterm,
        "num_persist_mem_tokens": chance.choice([0, 3]),
        "neural_memory_qkv_receives_diff_views": flag(),
        "dim_head": chance.choice([4, 6]),
        "heads": chance.choice([1, 2]),
        "ff_mult": chance.choice([2, 4, 1.5]),
        "num_residual_streams": chance.choice([1, 2, 4]),
        "neural_memory_layers": layers,
        "sliding_window_attn": flag(),
        "neural_mem_weight_residual": flag(),
    }
    chunk = arguments["neural_memory_segment_len"] or segment + longterm
    arguments["neural_memory_batch_size"] = chance.choice([None, 2 * chunk])
    network = seed % len(NETWORKS)
    module = make_transformer(NETWORKS[network][0], **arguments, neural_memory_kwargs=memory)
    real_layers = (1, 2, 3) if layers is None else tuple(layer for layer in layers if layer <= 3)
    residual = arguments["neural_mem_weight_residual"] and len(real_layers) > 1
    expected = TransformerOptions(
        num_tokens=13,
        dim=8,
        depth=3,
        segment_len=segment,
        num_longterm_mem_tokens=longterm,
        num_persist_mem_tokens=arguments["num_persist_mem_tokens"],
        dim_head=arguments["dim_head"],
        heads=arguments["heads"],
        ff_hidden=int(8 * arguments["ff_mult"] * 2 / 3),
        num_residual_streams=arguments["num_residual_streams"],
        neural_memory_layers=real_layers,
        sliding_window_attn=arguments["sliding_window_attn"],
        neural_mem_gate_attn_output=arguments["neural_mem_gate_attn_output"],
        neural_mem_weight_residual=residual,
        neural_memory_qkv_receives_diff_views=arguments["neural_memory_qkv_receives_diff_views"],
        memory=memory_options(
            memory,
            network,
            chunk_size=chunk,
            batch_size=arguments["neural_memory_batch_size"],
            qkv_receives_diff_views=True,
            accept_weight_residual=residual,
        ),
    )
    live = from_module(module)
    assert (live.kind, live.options) == ("transformer", expected)
    keys = ["segment_len", "neural_memory_segment_len", "neural_memory_batch_size", "sliding_window_attn"]
    keys += ["neural_mem_gate_attn_output"] * (arguments["num_residual_streams"] == 1)
    least = {key: arguments[key] for key in keys} | {"neural_memory_kwargs": hidden_only(memory)}
    source = read_with(tmp_path, module, least)
    assert (source.kind, source.options) == ("transformer", expected)
    everything = arguments | {"neural_memory_kwargs": memory, "neural_memory_model": NETWORKS[network][0]}
    assert read_with(tmp_path, module, everything).options == expected
    assert read_with(tmp_path, module, live.config).options == expected
    same_tensors(source, module)
    same_tensors(live, module)


def same_tensors(source: Source, module: nn.Module) -> None:
    wanted = {name: value for name, value in module.state_dict().items() if "memory_model." not in name}
    assert source.tensors.keys() == wanted.keys()
    assert all(value.dtype == torch.float32 for value in source.tensors.values())
    assert all(torch.equal(source.tensors[name], value) for name, value in wanted.items())


def test_one_memory_layer_has_no_weight_residual_and_a_first_layer_one_view() -> None:
    module = make_transformer(
        neural_memory_layers=(1,), neural_mem_weight_residual=True, neural_memory_qkv_receives_diff_views=True
    )
    options = from_module(module).options
    assert isinstance(options, TransformerOptions)
    assert not options.neural_mem_weight_residual
    assert not options.neural_memory_qkv_receives_diff_views


def test_train_mac_is_built_in(tmp_path: Path) -> None:
    memory = {"dim_head": 64, "heads": 4, "attn_pool_chunks": True, "qk_rmsnorm": True, "momentum": True,
              "momentum_order": 1, "default_step_transform_max_lr": 1e-1, "per_parameter_lr_modulation": True,
              "spectral_norm_surprises": True}  # fmt: skip
    with torch.device("meta"):
        module = library.MemoryAsContextTransformer(
            num_tokens=256, dim=384, depth=8, segment_len=32, num_persist_mem_tokens=4, num_longterm_mem_tokens=4,
            neural_memory_layers=(2, 4, 6), neural_memory_segment_len=4, neural_memory_batch_size=128,
            neural_mem_weight_residual=True, neural_memory_qkv_receives_diff_views=True, sliding_window_attn=True,
            neural_memory_model=library.MemoryMLP(dim=64, depth=2), neural_memory_kwargs=memory,
        )  # fmt: skip
    # Only shapes matter: each tensor is one number in the file.
    state = {
        name: 10_000.0 ** -(torch.arange(32) / 32) if name.endswith("freqs") else torch.zeros(()).expand(value.shape)
        for name, value in module.state_dict().items()
    }
    source = read_with(tmp_path, state, "train_mac")
    assert source.config["neural_memory_layers"] == [2, 4, 6]
    assert source.options == TransformerOptions(
        num_tokens=256, dim=384, depth=8, segment_len=32, num_longterm_mem_tokens=4, num_persist_mem_tokens=4,
        dim_head=64, heads=8, ff_hidden=1024, num_residual_streams=4, neural_memory_layers=(2, 4, 6),
        sliding_window_attn=True, neural_mem_gate_attn_output=False, neural_mem_weight_residual=True,
        neural_memory_qkv_receives_diff_views=True,
        memory=MemoryOptions(
            dim=384, chunk_size=4, batch_size=128, dim_head=64, heads=4, network=NetworkOptions("mlp", 2, 128),
            default_step_transform_max_lr=0.1, per_parameter_lr_modulation=True, max_mem_layer_modulation=1.0,
            per_head_learned_parameters=True, attn_pool_chunks=True, momentum=True, momentum_order=1,
            learned_momentum_combine=False, learned_combine_include_zeroth=False, num_kv_per_token=1,
            qkv_receives_diff_views=True, pre_rmsnorm=True, post_rmsnorm=False, qk_rmsnorm=True, max_grad_norm=None,
            activation=None, accept_weight_residual=True, spectral_norm_surprises=True, gated_transition=False,
            mem_model_norm_add_residual=True, store_with_lookahead_value=False,
        ),
    )  # fmt: skip


WAYS: dict[str, Callable[[nn.Module, Path], Path]] = {}


def way(save: Callable[[nn.Module, Path], Path]) -> Callable[[nn.Module, Path], Path]:
    WAYS[save.__name__] = save
    return save


def _pickled(value: Any, folder: Path, **options: Any) -> Path:
    torch.save(value, folder / "model.pt", **options)
    return folder / "model.pt"


@way
def plain(module: nn.Module, folder: Path) -> Path:
    return _pickled(module.state_dict(), folder)


@way
def older_format(module: nn.Module, folder: Path) -> Path:
    return _pickled(module.state_dict(), folder, _use_new_zipfile_serialization=False)


@way
def under_model(module: nn.Module, folder: Path) -> Path:
    return _pickled({"model": module.state_dict(), "optimizer": {"state": {}}, "step": 3}, folder)


@way
def under_state_dict_of_lightning(module: nn.Module, folder: Path) -> Path:
    state = {f"model.{name}": value for name, value in module.state_dict().items()}
    return _pickled({"state_dict": state, "epoch": 1}, folder)


@way
def compiled_and_distributed(module: nn.Module, folder: Path) -> Path:
    return _pickled({f"module._orig_mod.{name}": value for name, value in module.state_dict().items()}, folder)


def without_shared_memory(module: nn.Module, folder: Path) -> Path:
    """As accelerate's save_model: of tensors in the same memory, or without elements, the first one alone is saved."""
    kept: dict[int, str] = {}
    state = module.state_dict()
    for name, value in state.items():
        kept.setdefault(value.untyped_storage().data_ptr(), name)
    path = folder / "model.safetensors"
    save_file({name: state[name].contiguous() for name in kept.values()}, path)
    return path


@way
def shards_of_an_average(module: nn.Module, folder: Path) -> Path:
    """As accelerate's save_model writes the state dict of ema-pytorch."""
    state = {f"ema_model.module.{name}": value.clone() for name, value in module.state_dict().items()}
    names = sorted(state)
    where = {}
    for number in (1, 2):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names[number - 1 :: 2]}, folder / file)
        where |= dict.fromkeys(names[number - 1 :: 2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@way
def safetensors(module: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({name: value.clone() for name, value in module.state_dict().items()}, path)
    return path


@way
def safetensors_of_a_module(module: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    for parameter in module.parameters():  # the heads' copies are views of one, which save_model does not take
        parameter.data = parameter.data.contiguous()
    save_model(module, str(path))
    return path


@pytest.mark.parametrize("shared", [False, True], ids=["heads apart", "heads alike"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_saving_is_read(name: str, shared: bool, tmp_path: Path) -> None:
    """Where the heads share their initial memory, the library's dead copies are the very same tensors."""
    module = make_transformer(
        neural_memory_kwargs={"heads": 2, "dim_head": 4, "per_head_learned_parameters": not shared}
    )
    path = WAYS[name](module, tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(HIDDEN_TRANSFORMER))
    source = read(path, tmp_path / "model.json")
    same_tensors(source, module)
    assert source.options == from_module(module).options
    assert len(source.weights_sha256) == 64
    assert source.config == HIDDEN_TRANSFORMER


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("network", range(len(NETWORKS)))
def test_tensors_left_out_as_shared_are_restored(network: int, per_head: bool, tmp_path: Path) -> None:
    """A transformer without longterm and persistent memories, which has six tensors without elements or more."""
    kwargs = {"heads": 2, "dim_head": 4, "per_head_learned_parameters": per_head}
    module = make_transformer(NETWORKS[network][0], neural_memory_kwargs=kwargs)
    path = without_shared_memory(module, tmp_path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert not [name for name in names if "memory_model_parameters" in name or "persistent_memory" in name]
    for given in ({}, {"per_head_learned_parameters": per_head}):
        config = HIDDEN_TRANSFORMER | {"neural_memory_kwargs": HIDDEN | given}
        (tmp_path / "model.json").write_text(json.dumps(config))
        source = read(path, tmp_path / "model.json")
        for name, value in source.tensors.items():
            right = module.state_dict()[name]
            assert torch.equal(value.expand(right.shape), right)
    assert source.options == from_module(module).options


def test_the_hash_is_the_contents(tmp_path: Path) -> None:
    module = make_memory()
    first = read_with(tmp_path, module, HIDDEN_MEMORY).weights_sha256, from_module(module).weights_sha256
    with torch.no_grad():
        module.to_keys.weight[0, 0] += 1
    second = read_with(tmp_path, module, HIDDEN_MEMORY).weights_sha256, from_module(module).weights_sha256
    assert first[0] != second[0] and first[1] != second[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    module = make_transformer().to(dtype)
    source = read_with(tmp_path, module, HIDDEN_TRANSFORMER)
    for name, value in source.tensors.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, module.state_dict()[name].float())


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, make_memory(activation="silu", per_parameter_lr_modulation=True), None)
    defaults = HIDDEN_MEMORY | {"chunk_size": 1, "max_mem_layer_modulation": 1.0}
    for key in [*defaults, "activation"]:
        assert re.search(rf"lacks arguments .*\b{key}\b.*\. Fix: add", message)
    assert json.loads(message[message.index("{") : message.index("}") + 1]) == defaults
    assert "without a default: activation" in message
    transformer = make_transformer(num_residual_streams=1)
    message = refusal(tmp_path, transformer, {})
    pasted = json.loads(message[message.index("{") : message.rindex("}") + 1])
    assert "without a default: segment_len" in message
    source = read_with(tmp_path, transformer, pasted | {"segment_len": 4})
    assert source.options == from_module(transformer).options
    for key in pasted["neural_memory_kwargs"]:
        less = {name: value for name, value in HIDDEN.items() if name != key}
        message = refusal(tmp_path, transformer, pasted | {"segment_len": 4, "neural_memory_kwargs": less})
        assert f"do not determine: neural_memory_kwargs.{key}. Fix:" in message


def read_with_defaults(folder: Path, module: nn.Module, config: dict[str, Any]) -> Source:
    torch.save(module.state_dict(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(config))
    return read(folder / "model.pt", folder / "model.json", LoadOptions(library_defaults=True))


def test_library_defaults_are_those_of_the_library(tmp_path: Path) -> None:
    """Modules that the library makes with nothing but what has no default, read from their tensors alone."""
    memory = library.NeuralMemory(dim=8)
    source = read_with_defaults(tmp_path, memory, {})
    assert source.options == from_module(memory).options
    assert source.origin.library_defaults == HIDDEN_MEMORY | {"chunk_size": 1}
    assert any("the library's defaults are used for chunk_size = 1, " in note for note in source.origin.notes)
    for streams in (1, 4):
        transformer = library.MemoryAsContextTransformer(
            num_tokens=11, dim=8, depth=2, segment_len=4, heads=2, dim_head=4, num_residual_streams=streams
        )
        source = read_with_defaults(tmp_path, transformer, {"segment_len": 4})
        assert source.options == from_module(transformer).options
        assert source.library_defaults["neural_memory_kwargs.max_grad_norm"] is None
    source = read_with_defaults(tmp_path, memory, {"max_grad_norm": 0.5, "version": "0.5.2"})
    assert isinstance(source.options, MemoryOptions)
    assert (source.options.max_grad_norm, source.options.store_with_lookahead_value) == (0.5, True)
    assert "max_grad_norm" not in source.library_defaults
    with pytest.raises(CheckpointError, match=r"do not determine: segment_len\. Fix:"):
        read_with_defaults(tmp_path, transformer, {})
    with pytest.raises(CheckpointError, match=r"do not determine: activation\. Fix:"):
        read_with_defaults(tmp_path, make_memory(activation="silu"), {})


def test_values_of_the_training_are_named_and_not_taken(tmp_path: Path) -> None:
    """A training's batch_size need not be the memory's."""
    held = {"state_dict": make_memory().state_dict(), "hyper_parameters": {"chunk_size": 4, "batch_size": 32, "lr": 1}}
    message = refusal(tmp_path, held, HIDDEN)
    assert 'the checkpoint holds {"chunk_size": 4, "batch_size": 32}, if these are the model' in message


def test_the_default_is_that_of_the_version(tmp_path: Path) -> None:
    assert '"store_with_lookahead_value": true' in refusal(tmp_path, make_memory(), {"version": "0.5.2"})
    assert '"store_with_lookahead_value": false' in refusal(tmp_path, make_memory(), {"version": "0.5.5"})


FULL = {
    "heads": 2,
    "dim_head": 4,
    "per_parameter_lr_modulation": True,
    "momentum_order": 2,
    "learned_momentum_combine": True,
}
CONTRADICTIONS = [
    ("num_tokens", 12, "token_emb.weight has shape [11, 8]"),
    ("dim", 16, "token_emb.weight has shape [11, 8]"),
    ("depth", 3, "layers.1.*"),
    ("num_longterm_mem_tokens", 1, "longterm_mems has shape [0, 8]"),
    ("num_persist_mem_tokens", 1, "layers.0.5.persistent_memory has shape [2, 2, 0, 4]"),
    ("dim_head", 8, "layers.0.5.persistent_memory has shape [2, 2, 0, 4]"),
    ("heads", 4, "layers.0.5.persistent_memory has shape [2, 2, 0, 4]"),
    ("ff_mult", 2, "layers.0.6.3.weight has shape [8, 21]"),
    ("num_residual_streams", 1, "expand_streams.stream_embed has shape [4, 8]"),
    ("neural_memory_layers", [2], "those with a memory are layers.0.4.*, layers.1.4.*"),
    ("neural_mem_weight_residual", True, "there is no tensor layers.1.4.to_learned_weight_residual_mix.0.weight"),
    ("neural_memory_qkv_receives_diff_views", True, "there is no tensor layers.1.3.1.weight"),
    ("neural_mem_gate_attn_output", True, "layers.0.0.static_beta has shape [4]"),
    ("neural_memory_kwargs.heads", 1, "layers.0.4.to_decay_factor.0.weight has shape [2, 8]"),
    ("neural_memory_kwargs.dim_head", 8, "layers.0.4.to_queries.weight has shape [8, 8]"),
    ("neural_memory_kwargs.dim_head", None, "layers.0.4.to_queries.weight has shape [8, 8]"),
    ("neural_memory_kwargs.num_kv_per_token", 2, "layers.0.4.to_adaptive_step.0.weight has shape [2, 8]"),
    ("neural_memory_kwargs.per_parameter_lr_modulation", False, "to_layer_modulation.0.weight has shape [6, 8]"),
    ("neural_memory_kwargs.per_head_learned_parameters", False, "memory_model_parameters.0 has shape [2, 4]"),
    ("neural_memory_kwargs.attn_pool_chunks", True, "no tensor layers.0.4.reduce_to_chunk_rep.to_attn_logits.weight"),
    ("neural_memory_kwargs.momentum", False, "layers.0.4.to_momentum.0.weight has shape [4, 8]"),
    ("neural_memory_kwargs.momentum_order", 3, "layers.0.4.to_momentum.0.weight has shape [4, 8]"),
    ("neural_memory_kwargs.learned_momentum_combine", False, "momentum_combine.0.weight has shape [4, 8]"),
    ("neural_memory_kwargs.learned_combine_include_zeroth", True, "momentum_combine.0.weight has shape [4, 8]"),
    ("neural_memory_kwargs.pre_rmsnorm", False, "layers.0.4.retrieve_norm.weight has shape [8]"),
    ("neural_memory_kwargs.post_rmsnorm", True, "there is no tensor layers.0.4.multihead_rmsnorm.gamma"),
    ("neural_memory_kwargs.qk_rmsnorm", True, "there is no tensor layers.0.4.q_norm.gamma"),
    ("neural_memory_kwargs.gated_transition", True, "there is no tensor layers.0.4.transition_gate"),
    ("neural_memory_kwargs.mem_model_norm_add_residual", False, "layers.0.4.memory_model.norm.gamma has shape [4]"),
    ("neural_memory_kwargs.activation", "silu", "there is no tensor layers.0.4.to_queries.0.weight"),
    ("neural_memory_model", {"type": "MemorySwiGluMLP"}, "memory_model.model.weights.0 has shape [4, 16]"),
    ("neural_memory_model", {"type": "MemoryMLP", "depth": 2}, "memory_model.model.weights.0 has shape [4, 16]"),
    ("neural_memory_model", {"type": "MemoryMLP", "depth": 3, "expansion_factor": 4}, "weights.0 has shape [4, 16]"),
    ("neural_memory_model", {"type": "MemoryMLP", "dim": 8, "expansion_factor": 4}, "queries.weight has shape [8, 8]"),
    ("neural_memory_kwargs.default_model_kwargs", {"depth": 3}, "memory_model.model.weights.0 has shape [4, 16]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def full_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    return plain(make_transformer(neural_memory_kwargs=FULL), folder)


@pytest.mark.parametrize(("key", "value", "evidence"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_a_contradiction_names_key_value_and_tensor(
    key: str, value: Any, evidence: str, full_transformer: Path, tmp_path: Path
) -> None:
    scope, _, argument = key.rpartition(".")
    config = json.loads(json.dumps(HIDDEN_TRANSFORMER))
    config["neural_memory_kwargs"]["max_mem_layer_modulation"] = 1.0
    (tmp_path / "right.json").write_text(json.dumps(config))
    read(full_transformer, tmp_path / "right.json")
    (config[scope] if scope else config)[argument] = value
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read(full_transformer, tmp_path / "wrong.json")
    message = str(caught.value)
    assert message.startswith(f"[config] {key}") and "TITANS-E0310" in message
    assert evidence in message
    shown = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value
    assert isinstance(value, dict) or f"{json.dumps(shown)} in wrong.json" in message


def test_an_activation_that_there_is_contradicts_null(tmp_path: Path) -> None:
    message = refusal(tmp_path, make_memory(activation="silu"), HIDDEN_MEMORY | {"activation": None})
    assert "activation" in message and "to_queries.0.weight has shape [8, 8]" in message
    for written in ("SiLU", "nn.SiLU", "torch.nn.SiLU()", "silu"):
        source = read_with(tmp_path, make_memory(activation="silu"), HIDDEN_MEMORY | {"activation": written})
        assert isinstance(source.options, MemoryOptions) and source.options.activation == "silu"


INVALID = [
    ({"class": "MemoryAsContextTransformer"}, "expected NeuralMemory by the tensors"),
    ({"chunk_sise": 4}, "chunk_sise, did you mean chunk_size?"),
    ({"chunk_size": "4"}, 'chunk_size: expected a positive integer or a pair of them, got "4"'),
    ({"chunk_size": 0}, "positive integer"),
    ({"momentum": 1}, "momentum: expected true or false, got 1"),
    ({"max_grad_norm": 0}, "max_grad_norm: expected a finite number above 0 or null, got 0"),
    ({"default_step_transform_max_lr": float("nan")}, "NaN is not a JSON number"),
    ({"activation": "Mish"}, "activation: expected one of silu, gelu, relu, tanh, sigmoid"),
    ({"model": {"type": "MyMemory"}}, "does not contain the code of another module"),
    ({"model": {"type": "MemoryAttention", "dim": 8}}, "MemoryAttention: it attends over one token in decoding"),
    ({"model": {"type": "MemoryMLP", "width": 3}}, "model.width"),
    ({"store_memory_loss_fn": "huber"}, "the library's own loss"),
    ({"adaptive_step_transform": "exp"}, "the library's own step transform"),
    ({"version": "0.4.11"}, 'titans-pytorch in model.json: expected 0.5, got "0.4.11"'),
    ({"version": "0.50"}, "expected 0.5, got"),
    ({"chunk_size": [4, 2]}, "expected one size, got [4, 2]"),
    ({"batch_size": 6}, "batch_size: expected a multiple of chunk_size, 4, got 6"),
    ({"heads": 1, "dim": 8, "dim_head": 4}, "expected dim, 8, as heads is 1"),
    ({"learned_momentum_combine": True, "momentum_order": 1}, "expected momentum of order 2 or more"),
    ({"learned_momentum_combine": True, "momentum": False}, "expected momentum of order 2 or more"),
]


@pytest.mark.parametrize(("config", "says"), INVALID, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in refusal(tmp_path, make_memory(), HIDDEN_MEMORY | config)


def test_arguments_that_change_nothing_are_let_through(tmp_path: Path) -> None:
    ignored = {
        "use_accelerated_scan": True, "init_decay_bias": 1.0, "init_momentum_bias": None, "init_adaptive_step_bias": -6,
        "store_memory_loss_fn": None, "adaptive_step_transform": None, "version": "0.5.5", "chunk_size": [4, 4],
    }  # fmt: skip
    module = make_memory()
    assert read_with(tmp_path, module, HIDDEN_MEMORY | ignored).options == from_module(module).options
    transformer = make_transformer()
    config = HIDDEN_TRANSFORMER | {"use_flex_attn": True, "neural_memory_add_value_residual": True, "token_emb": None}
    assert read_with(tmp_path, transformer, config).options == from_module(transformer).options


def test_the_memory_of_a_transformer_takes_no_argument_that_the_transformer_sets(tmp_path: Path) -> None:
    config = HIDDEN_TRANSFORMER | {"neural_memory_kwargs": HIDDEN | {"chunk_size": 4}}
    assert "chunk_size in neural_memory_kwargs of model.json, which the transformer sets itself" in refusal(
        tmp_path, make_transformer(), config
    )


def test_attention_pooling_needs_a_chunk(tmp_path: Path) -> None:
    message = refusal(tmp_path, make_memory(attn_pool_chunks=True), HIDDEN_MEMORY | {"chunk_size": 1})
    assert "chunk_size: expected more than 1 with attn_pool_chunks" in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0"])
def test_what_is_no_configuration(text: str, tmp_path: Path) -> None:
    path = plain(make_memory(), tmp_path)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"\[config\]"):
        read(path, tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="or give train_mac"):
        read(path, tmp_path / "missing.json")


class AddOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("residual", [True, False])
def test_other_memory_networks_are_refused(residual: bool, tmp_path: Path) -> None:
    options = {"dim": 8, "chunk_size": 4, "mem_model_norm_add_residual": residual}
    attention = library.NeuralMemory(model=library.MemoryAttention(8), **options)
    own = library.NeuralMemory(model=AddOne(), **options)
    assert "MemoryAttention: it attends" in refusal(tmp_path, attention, HIDDEN_MEMORY)
    message = refusal(tmp_path, own, HIDDEN_MEMORY)
    assert "unsupported memory network" in message and "scale of shape [8]" in message
    with pytest.raises(CheckpointError, match="MemoryAttention"):
        from_module(attention)
    with pytest.raises(CheckpointError, match="AddOne"):
        from_module(own)


def test_five_square_matrices_are_two_networks(tmp_path: Path) -> None:
    spec = {"type": "MemoryMLP", "depth": 5, "expansion_factor": 1}
    module = make_memory(spec)
    assert "model (the tensors fit MemoryMLP and MemoryAttention)" in refusal(tmp_path, module, HIDDEN_MEMORY)
    source = read_with(tmp_path, module, HIDDEN_MEMORY | {"model": spec})
    assert isinstance(source.options, MemoryOptions) and source.options.network == NetworkOptions("mlp", 5, 8)
    assert from_module(module).options == source.options
    transformer = make_transformer(spec)
    config = HIDDEN_TRANSFORMER | {"neural_memory_model": spec}
    assert "neural_memory_model (the tensors fit" in refusal(tmp_path, transformer, HIDDEN_TRANSFORMER)
    assert read_with(tmp_path, transformer, config).options == from_module(transformer).options
    attention = make_memory({"type": "MemoryAttention", "expansion_factor": 1})
    with pytest.raises(CheckpointError, match="MemoryAttention"):
        from_module(attention)


def test_what_a_live_module_hides_is_refused_by_name() -> None:
    class Derived(library.NeuralMemory):  # type: ignore[misc, name-defined]
        pass

    for says, make in {
        "store_memory_loss_fn: expected the library's own, got absolute": lambda: make_memory(
            store_memory_loss_fn=absolute
        ),
        "adaptive_step_transform: expected the library's own, got sigmoid": lambda: make_memory(
            adaptive_step_transform=torch.sigmoid
        ),
        "unsupported activation: expected one of silu": lambda: library.NeuralMemory(
            8, 4, activation=nn.GELU(approximate="tanh")
        ),
        "got Mish": lambda: library.NeuralMemory(8, 4, activation=nn.Mish()),
        "token_emb": lambda: make_transformer(token_emb=nn.Embedding(11, 8, max_norm=1.0)),
        "got Derived": lambda: Derived(8, 4),
        "got Linear": lambda: nn.Linear(2, 2),
    }.items():
        with pytest.raises(CheckpointError, match=says):
            from_module(make())


def absolute(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).abs().mean(dim=-1)


def test_another_model_is_named_by_its_tensors(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    assert "MemoryAsContextTransformer or NeuralMemory: 0.bias, 0.weight, 1.bias" in refusal(
        tmp_path, other, HIDDEN_MEMORY
    )
    owner = nn.ModuleDict({"mem": make_memory(), "head": nn.Linear(2, 2)})
    message = refusal(tmp_path, owner, HIDDEN_MEMORY)
    assert (
        "head.bias, head.weight" in message
        and "save the state dict of the NeuralMemory in it, module mem, alone" in message
    )
    owner = nn.ModuleDict({"net": make_transformer(), "head": nn.Linear(2, 2)})
    assert "the MemoryAsContextTransformer in it" in refusal(tmp_path, owner, HIDDEN_TRANSFORMER)
    state = make_memory().state_dict()
    assert "unknown tensors for a NeuralMemory with these options: extra" in refusal(
        tmp_path, {**state, "extra": torch.ones(1)}, HIDDEN_MEMORY
    )
    prelu = library.NeuralMemory(8, 4, activation=nn.PReLU())
    assert "to_keys.1.weight" in refusal(tmp_path, prelu, HIDDEN_MEMORY | {"activation": "relu"})


def test_every_tensor_must_be_there_and_have_its_shape() -> None:
    """Each tensor in turn left out, and each made wider: never another error, never a model."""
    module = make_transformer(
        num_longterm_mem_tokens=1, num_persist_mem_tokens=1, neural_mem_weight_residual=True,
        neural_memory_qkv_receives_diff_views=True, neural_memory_kwargs=FULL | {"gated_transition": True},
    )  # fmt: skip
    kwargs = HIDDEN | {"max_mem_layer_modulation": 1.0}
    config = HIDDEN_TRANSFORMER | {"neural_memory_kwargs": kwargs}
    state = module.state_dict()
    assemble("model.json", config, state, "")
    for name, value in state.items():
        for changed in (
            {key: state[key] for key in state if key != name},
            {**state, name: torch.ones(*value.shape, 3)},
        ):
            with pytest.raises(CheckpointError):
                assemble("model.json", config, changed, "")


@pytest.mark.parametrize("streams", [1, 4])
def test_a_transformer_without_memory_is_refused(streams: int, tmp_path: Path) -> None:
    module = make_transformer(neural_memory_layers=(), num_residual_streams=streams)
    assert "without a memory in layers" in refusal(tmp_path, module, HIDDEN_TRANSFORMER)
    with pytest.raises(CheckpointError, match="without a memory in layers"):
        from_module(module)


def test_version_0_4_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its transformer took these connections, with the tensors that it then had."""
    import hyper_connections
    import titans_pytorch.mac_transformer as module

    older = hyper_connections.get_init_and_expand_reduce_stream_functions
    monkeypatch.setattr(module, "mc_get_init_and_expand_reduce_stream_functions", older)
    message = refusal(tmp_path, make_transformer(), HIDDEN_TRANSFORMER)
    assert "layers.0.0.dynamic_alpha_scale of shape []" in message and "as in titans-pytorch 0.4 or older" in message


def test_older_tensors_are_recognised(tmp_path: Path) -> None:
    state = make_memory().state_dict()
    joined = torch.cat([state.pop("to_keys.weight"), state.pop("to_values.weight")])
    older = {**state, "to_keys_values.weight": joined}
    assert "to_keys_values.weight of shape [16, 8], as in titans-pytorch 0.3" in refusal(tmp_path, older, HIDDEN_MEMORY)
    state = make_transformer().state_dict()
    state["layers.0.0.dynamic_alpha_fn"] = state["layers.0.0.dynamic_alpha_fn"][0]
    assert "hyper-connections older than 0.4" in refusal(tmp_path, state, HIDDEN_TRANSFORMER)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value: float, tmp_path: Path) -> None:
    state = make_memory().state_dict()
    state["to_values.weight"][3, 3] = value
    assert "NaN or infinity in tensor to_values.weight" in refusal(tmp_path, state, HIDDEN_MEMORY)
    state["to_values.weight"] = torch.full((8, 8), 1e39, dtype=torch.float64)  # no float32
    assert "NaN or infinity in tensor to_values.weight" in refusal(tmp_path, state, HIDDEN_MEMORY)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    state = make_memory().state_dict()
    state["to_values.weight"] = torch.zeros(8, 8).to(dtype)
    assert f"got {str(dtype).removeprefix('torch.')}. Fix:" in refusal(tmp_path, state, HIDDEN_MEMORY)


def test_sparse_tensors_and_other_frequencies_are_refused(tmp_path: Path) -> None:
    state = make_memory().state_dict()
    state["to_values.weight"] = torch.eye(8).to_sparse()
    assert "got sparse_coo" in refusal(tmp_path, state, HIDDEN_MEMORY)
    state = make_transformer().state_dict()
    state["layers.1.5.rotary_emb.freqs"] = torch.tensor([1.0, 0.5])
    assert "the library's rotary frequencies" in refusal(tmp_path, state, HIDDEN_TRANSFORMER)


class RunsCode:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_no_code(zipped: bool, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    state = {**make_memory().state_dict(), "x": RunsCode(trap)}
    path = _pickled({"model": state}, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"would run code, \w+.mkdir \(no code was run\)\. Fix: .*safetensors"):
        read(path, None)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap is none, so the test proves nothing"


@pytest.mark.parametrize("name", ["plain", "older_format", "safetensors"])
def test_cut_files_are_refused(name: str, tmp_path: Path) -> None:
    path = WAYS[name](make_memory(), tmp_path)
    whole = path.read_bytes()
    for size in {0, 1, 3, 100, *range(len(whole) // 12, len(whole), len(whole) // 12), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"^\[checkpoint\] (damaged|truncated) file|has more than tensors"):
            read(path, None)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "missing.pt", None)
    with pytest.raises(CheckpointError, match="no weights in"):
        read(tmp_path, None)
    for value in ([1, 2], {"a": 1}, {}, torch.ones(3), {"model": {"step": 1}}):
        with pytest.raises(CheckpointError, match="no state dict in"):
            read(_pickled(value, tmp_path), None)
    (tmp_path / "text.pt").write_text("hello world")
    with pytest.raises(CheckpointError, match="has more than tensors"):
        read(tmp_path / "text.pt", None)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("a", "b")
    with pytest.raises(CheckpointError, match="damaged file"):
        read(tmp_path / "other.pt", None)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="no tensors in"):
        read(tmp_path / "empty.safetensors", None)
