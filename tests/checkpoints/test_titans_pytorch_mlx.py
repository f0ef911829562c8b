"""Models of titans-pytorch-mlx: the stream against the library's formulas, its checkpoints, its graphs.

The oracle below is those formulas, whole segments at a time in float64 with autograd for the memory's gradient, over
tensors with the library's names. It gives the library's own logits, of commit 0dc7a4d in float64, to 3e-15 without and
8e-7 with rotary positions, whose cosines the library keeps in float32.
"""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import Tensor

from titans_export.checkpoints.checkpoint import LoadOptions
from titans_export.checkpoints.titans_pytorch_mlx import DEFAULTS, load
from titans_export.errors import CheckpointError, UsageError
from titans_export.model.layers import StreamState
from titans_export.model.stream import Call, StreamModel
from titans_export.onnx.graphs import export_graph

BASE = {
    **DEFAULTS,
    "dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "ffn_mult": 1.5,
    "memory_hidden_mult": 2.0,
    "num_persistent_tokens": 3,
    "chunk_size": 8,
    "window_size": 8,
    "vocab_size": 29,
    "memory_lr": 1.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lmm": ("lmm", {}),
    "mag": ("mag", {}),
    "mal": ("mal", {}),
    "mag-window-divides": ("mag", {"window_size": 4}),
    "mal-window-does-not-divide": ("mal", {"window_size": 5}),
    "mal-window-of-more-than-a-segment": ("mal", {"window_size": 40}),
    "mag-no-persistent": ("mag", {"num_persistent_tokens": 0}),
    "mag-no-rotary": ("mag", {"use_rope": False, "num_heads": 16}),
    "lmm-linear": ("lmm", {"num_memory_layers": 1}),
    "mag-deep-gelu": ("mag", {"num_memory_layers": 4, "activation": "gelu"}),
    "mal-relu": ("mal", {"activation": "relu", "num_memory_layers": 3}),
    "lmm-no-conv": ("lmm", {"use_conv": False}),
    "lmm-conv-of-one": ("lmm", {"conv_kernel_size": 1}),
    "mag-conv-of-more-than-a-segment": ("mag", {"conv_kernel_size": 6, "chunk_size": 4, "window_size": 2}),
    "mal-segments-of-one": ("mal", {"chunk_size": 1}),
    "mag-parts": ("mag", {"chunk_size": 72, "window_size": 12}),
}


def tensors_of(variant: str, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the library's names and shapes, large enough that every part of the model shows in logits."""
    generator = torch.Generator().manual_seed(seed)
    dim = config["dim"]

    def normal(*shape: int, std: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if std is None else std)

    tensors = {"embed.weight": normal(config["vocab_size"], dim, std=0.5)}
    for i in range(config["num_layers"]):
        p = f"blocks.{i}."
        tensors |= {f"{p}memory.proj_{x}.weight": normal(dim, dim) * 2 for x in ("k", "v", "q", "out")}
        if config["use_conv"]:
            width = config["conv_kernel_size"]
            for x in "kvq":
                tensors[f"{p}memory.conv_{x}.weight"] = normal(dim, 1, width)
                tensors[f"{p}memory.conv_{x}.bias"] = normal(dim, std=0.3)
        hidden = [int(dim * config["memory_hidden_mult"])] * (config["num_memory_layers"] - 1)
        widths = [dim, *hidden, dim]
        for j in range(config["num_memory_layers"]):
            tensors[f"{p}memory.memory.layers.{j}.weight"] = normal(widths[j + 1], widths[j]) * 2
        for gate, bias in (("decay", -2.0), ("lr", 1.0), ("momentum", 0.0)):
            tensors[f"{p}memory.gate_{gate}.0.weight"] = normal(dim, dim) * 2
            tensors[f"{p}memory.gate_{gate}.0.bias"] = normal(dim) + bias
        if variant != "lmm":
            tensors |= {f"{p}attention.proj_{x}.weight": normal(dim, dim) * 2 for x in ("q", "k", "v", "out")}
            if config["use_rope"]:
                size = dim // config["num_heads"]
                tensors[f"{p}attention.rope.inv_freq"] = 10000 ** (-torch.arange(0, size, 2) / size)
            if config["num_persistent_tokens"]:
                tensors[f"{p}persistent.tokens"] = normal(config["num_persistent_tokens"], dim, std=0.7)
        inner = int(dim * config["ffn_mult"])
        tensors |= {f"{p}ffn.{x}_proj.weight": normal(inner, dim) for x in ("gate", "up")}
        tensors[f"{p}ffn.down_proj.weight"] = normal(dim, inner)
        for j in range(3 if variant == "mal" else 2):
            tensors[f"{p}norm{j + 1}.weight"] = 1 + normal(dim, std=0.2)
    tensors["norm.weight"] = 1 + normal(dim, std=0.2)
    tensors["head.weight"] = tensors["embed.weight"]
    return tensors


class Oracle:
    """One stream of the library's model. Memory and surprise of each layer are carried from segment to segment."""

    def __init__(self, variant: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.variant, self.config = variant, config
        self.tensors = {name: value.double() for name, value in tensors.items()}
        depth = range(config["num_memory_layers"])
        self.w = [
            [self.tensors[f"blocks.{i}.memory.memory.layers.{j}.weight"] for j in depth]
            for i in range(config["num_layers"])
        ]
        self.s = [[torch.zeros_like(w) for w in layer] for layer in self.w]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensors[name], eps=1e-6)

    def _network(self, weights: list[Tensor], x: Tensor) -> Tensor:
        act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[self.config["activation"]]
        for i, w in enumerate(weights):
            x = F.linear(act(x) if i else x, w)
        return x

    def _memory(self, i: int, u: Tensor, learn: bool) -> Tensor:
        p = f"blocks.{i}.memory."
        found = {}
        for x in "qkv":
            rows = F.linear(u, self.tensors[f"{p}proj_{x}.weight"])
            if self.config["use_conv"]:
                past = self.config["conv_kernel_size"] - 1
                padded = F.pad(rows.t(), (past, 0)).unsqueeze(0)
                weight, bias = self.tensors[f"{p}conv_{x}.weight"], self.tensors[f"{p}conv_{x}.bias"]
                rows = F.conv1d(padded, weight, bias, groups=len(bias))[0].t()
            found[x] = F.silu(rows)
        q, k = F.normalize(found["q"], dim=-1), F.normalize(found["k"], dim=-1)
        read = F.linear(self._network(self.w[i], q), self.tensors[f"{p}proj_out.weight"])
        mean = u.mean(0)
        decay, lr, momentum = (
            torch.sigmoid(
                F.linear(mean, self.tensors[f"{p}gate_{x}.0.weight"], self.tensors[f"{p}gate_{x}.0.bias"])
            ).mean()
            for x in ("decay", "lr", "momentum")
        )
        if learn and len(u) == self.config["chunk_size"]:
            leaves = [w.detach().clone().requires_grad_() for w in self.w[i]]
            gradient = torch.autograd.grad(F.mse_loss(self._network(leaves, k), found["v"]), leaves)
            theta, eta = lr * self.config["memory_lr"], momentum * self.config["memory_momentum"]
            self.s[i] = [eta * s - theta * g for s, g in zip(self.s[i], gradient, strict=True)]
            self.w[i] = [(1 - decay) * w + s for w, s in zip(self.w[i], self.s[i], strict=True)]
        return read

    def _attention(self, i: int, x: Tensor) -> Tensor:
        p, heads = f"blocks.{i}.", self.config["num_heads"]
        first = self.config["num_persistent_tokens"]
        rows = torch.cat([self.tensors[f"{p}persistent.tokens"], x]) if first else x
        q, k, v = (
            F.linear(rows, self.tensors[f"{p}attention.proj_{n}.weight"]).unflatten(-1, (heads, -1)).transpose(0, 1)
            for n in "qkv"
        )
        if self.config["use_rope"]:
            frequencies = self.tensors[f"{p}attention.rope.inv_freq"].float()
            angle = torch.outer(torch.arange(len(rows)).float(), frequencies).double()
            turn = torch.polar(torch.ones_like(angle), angle)
            q, k = (
                torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
                for y in (q, k)
            )
        place = torch.arange(len(rows)) - first
        back = place[:, None] - place[None, :]
        seen = (place[None, :] < 0) | ((back >= 0) & (back < self.config["window_size"]))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)[first:]
        return F.linear(y, self.tensors[f"{p}attention.proj_out.weight"])

    def _ff(self, i: int, x: Tensor) -> Tensor:
        gate, up, down = (self.tensors[f"blocks.{i}.ffn.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def segment(self, tokens: Tensor, learn: bool = True) -> Tensor:
        """tokens: (T,) of one segment. Returns logits (T, vocab); a segment that is not whole leaves the memory."""
        x = self.tensors["embed.weight"][tokens]
        for i in range(self.config["num_layers"]):
            normed = self._norm(f"blocks.{i}.norm1.weight", x)
            m = self._memory(i, normed, learn)
            x = (x + self._attention(i, normed)) * m if self.variant == "mag" else x + m
            if self.variant == "mal":
                x = x + self._attention(i, self._norm(f"blocks.{i}.norm2.weight", x))
            last = 3 if self.variant == "mal" else 2
            x = x + self._ff(i, self._norm(f"blocks.{i}.norm{last}.weight", x))
        return F.linear(self._norm("norm.weight", x), self.tensors["embed.weight"])

    def stream(self, tokens: Tensor, learn: list[bool] | None = None) -> Tensor:
        """Logits of (T,) tokens; learn: of each segment."""
        parts = tokens.split(self.config["chunk_size"])
        flags = learn or [True] * len(parts)
        return torch.cat([self.segment(part, flag) for part, flag in zip(parts, flags, strict=True)])


def save(folder: Path, variant: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The folder that the library pushes to a hub."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    values = {"model_type": variant, "titans_config": config, "tokenizer_name": None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def case(name: str, tmp_path: Path) -> tuple[StreamModel, Oracle]:
    variant, changes = CASES[name]
    config = {**BASE, **changes}
    tensors = tensors_of(variant, config)
    return load(save(tmp_path / "checkpoint", variant, config, tensors)).model, Oracle(variant, config, tensors)


def tokens_of(count: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(0, BASE["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_stream_however_cut_is_the_library_over_whole_segments(name: str, tmp_path: Path) -> None:
    model, oracle = case(name, tmp_path)
    model = model.double()
    size = oracle.config["chunk_size"]
    tokens = tokens_of(5 * size + size // 2)
    wanted = oracle.stream(tokens[0])
    for cuts in ([tokens.shape[1]], [1] * tokens.shape[1], [1, size - 1, 2 * size + 1, size, size // 2]):
        state, position, out = model.initial_state(1), 0, []
        for part in tokens.split([*cuts, tokens.shape[1] - sum(cuts)], 1):
            y, state = model.feed(part, state, position)
            out.append(y)
            position += part.shape[1]
        assert error(torch.cat(out, 1)[0], wanted) < TOLERANCES["cpu", "float64"]


def test_the_memory_shows_in_the_logits(tmp_path: Path) -> None:
    """Otherwise the comparisons here would prove little: a memory that stays as it was gives other logits."""
    for name in ("lmm", "mag", "mal"):
        _, oracle = case(name, tmp_path)
        _, frozen = case(name, tmp_path)
        tokens = tokens_of(32)[0]
        assert error(frozen.stream(tokens, [False] * 4), oracle.stream(tokens)) > 1e-2


@pytest.mark.parametrize("name", ["mag-window-divides", "mal", "mal-segments-of-one"])
def test_the_state_is_the_same_however_it_was_reached(name: str, tmp_path: Path) -> None:
    model, oracle = case(name, tmp_path)
    model, size = model.double(), oracle.config["chunk_size"]
    tokens = tokens_of(3 * size)
    _, whole = model.feed(tokens, model.initial_state(1), 0)
    state = model.initial_state(1)
    for t in range(3 * size):
        graph = model.graphs(1)[-1]
        _, state = model.call(tokens[:, t : t + 1], state, Call(graph, torch.tensor([t])))
    assert list(state) == list(whole) == list(model.state_info()) == list(model.initial_state(1))
    for key, value in whole.items():
        assert value.shape == model.initial_state(1)[key].shape
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-10)
    oracle.stream(tokens[0])
    fields = model.state_info()["layers.1.memory"].layout
    row = whole["layers.1.memory"][0]
    for j, (w, s) in enumerate(zip(oracle.w[1], oracle.s[1], strict=True)):
        for field_name, matrix in ((f"W{j}", w), (f"S{j}", s)):
            field = next(f for f in fields if f.name == field_name)
            got = row[field.offset : field.offset + matrix.numel()].reshape(field.shape)
            assert error(got, matrix.t()) < TOLERANCES["cpu", "float64"]


@pytest.mark.parametrize("name", ["lmm", "mag", "mal"])
def test_a_frozen_memory_stays(name: str, tmp_path: Path) -> None:
    model, oracle = case(name, tmp_path)
    model, size = model.double(), oracle.config["chunk_size"]
    tokens, flags = tokens_of(4 * size), [True, False, True, False]
    wanted = oracle.stream(tokens[0], flags)
    for cuts in ([size], [3, size - 3]):
        state, position, out = model.initial_state(1), 0, []
        for flag in flags:
            for cut in cuts:
                y, state = model.feed(tokens[:, position : position + cut], state, position, learn=flag)
                out.append(y)
                position += cut
        assert error(torch.cat(out, 1)[0], wanted) < TOLERANCES["cpu", "float64"]


def test_tokens_that_do_not_learn_leave_no_gradient(tmp_path: Path) -> None:
    """As if the loss of their keys were 0; the gates' mean still counts them, and the segment's last token decides."""
    model, oracle = case("lmm", tmp_path)
    model, size = model.double(), oracle.config["chunk_size"]
    tokens = tokens_of(size)
    _, state = model.feed(tokens[:, :3], model.initial_state(1), 0, learn=False)
    before = state["layers.0.memory"]
    _, learned = model.feed(tokens[:, 3:], state, 3)
    _, state = model.feed(tokens[:, 3:-1], state, 3)
    _, last_frozen = model.feed(tokens[:, -1:], state, size - 1, learn=False)
    assert torch.equal(last_frozen["layers.0.memory"], before)
    p = "blocks.0.memory."
    u = oracle._norm("blocks.0.norm1.weight", oracle.tensors["embed.weight"][tokens[0]])
    w0 = oracle.w[0]
    rows = {}
    for x in "kv":
        rows[x] = F.linear(u, oracle.tensors[f"{p}proj_{x}.weight"])
        padded = F.pad(rows[x].t(), (3, 0)).unsqueeze(0)
        weight, bias = oracle.tensors[f"{p}conv_{x}.weight"], oracle.tensors[f"{p}conv_{x}.bias"]
        rows[x] = F.silu(F.conv1d(padded, weight, bias, groups=len(bias))[0].t())
    leaves = [w.clone().requires_grad_() for w in w0]
    loss = (oracle._network(leaves, F.normalize(rows["k"], dim=-1)) - rows["v"]).square()[3:].sum() / u.numel()
    gradient = torch.autograd.grad(loss, leaves)
    theta, alpha = (
        torch.sigmoid(
            F.linear(u.mean(0), oracle.tensors[f"{p}gate_{x}.0.weight"], oracle.tensors[f"{p}gate_{x}.0.bias"])
        ).mean()
        for x in ("lr", "decay")
    )
    wanted = (1 - alpha) * w0[0] - theta * gradient[0]
    got = learned["layers.0.memory"][0, : wanted.numel()].reshape(wanted.shape[::-1]).t()
    assert error(got, wanted) < TOLERANCES["cpu", "float64"]


def test_streams_of_a_batch_are_apart_and_may_stand_at_different_places(tmp_path: Path) -> None:
    model, oracle = case("mag-window-divides", tmp_path)
    model, size = model.double(), oracle.config["chunk_size"]
    starts, tokens = [size - 1, 2], tokens_of(2 * size + 4, batch=2)
    states = [model.feed(tokens[b : b + 1, :n], model.initial_state(1), 0)[1] for b, n in enumerate(starts)]
    state = {key: torch.cat([own[key] for own in states]) for key in states[0]}
    learn = torch.tensor([True, False])
    decode, out = model.graphs(1)[-1], []
    for t in range(size):
        now = torch.tensor(starts) + t
        y, state = model.call(tokens.gather(1, now[:, None]), state, Call(decode, now, learn))
        out.append(y)
    got = torch.cat(out, 1)
    for b, n in enumerate(starts):
        y, alone = model.feed(tokens[b : b + 1, n : n + size], states[b], n, learn=bool(learn[b]))
        torch.testing.assert_close(got[b : b + 1], y, rtol=1e-10, atol=1e-10)
        for key, value in alone.items():
            torch.testing.assert_close(state[key][b : b + 1], value, rtol=1e-10, atol=1e-10)


def sessions(model: StreamModel, chunks_per_call: int) -> dict[str, ort.InferenceSession]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return {
        graph.name: ort.InferenceSession(
            export_graph(model, graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for graph in model.graphs(chunks_per_call)
    }


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["lmm", "mag-parts", "mal-window-does-not-divide", "mal-segments-of-one"])
def test_graphs_are_the_model(name: str, tmp_path: Path) -> None:
    model, oracle = case(name, tmp_path)
    model = model.float()
    size = oracle.config["chunk_size"]
    graphs = model.graphs(2)
    run = sessions(model, 2)
    tokens = tokens_of(4 * size + size // 2)
    wanted = oracle.stream(tokens[0])
    state: StreamState = {key: value.detach() for key, value in model.initial_state(1).items()}
    done, out = 0, []
    for cut in (1, size - 1, 2 * size, size, size // 2):
        end = done + cut
        while done < end:
            graph = max(
                (g for g in graphs if g.tokens <= end - done and done % g.stride in g.offsets), key=lambda g: g.tokens
            )
            feeds = {"tokens": tokens[:, done : done + graph.tokens].numpy()}
            feeds |= {"position": torch.tensor([done]).numpy(), "learn": torch.tensor([True]).numpy()}
            feeds |= {key: value.numpy() for key, value in state.items()}
            taken = {x.name for x in run[graph.name].get_inputs()}
            y, *following = run[graph.name].run(None, {key: value for key, value in feeds.items() if key in taken})
            out.append(torch.from_numpy(y))
            state = {key: torch.from_numpy(value) for key, value in zip(state, following, strict=True)}
            done += graph.tokens
    assert (torch.cat(out, 1)[0] - wanted).abs().max() < TOLERANCES["cpu", "float32"]


def test_graphs_of_a_schedule(tmp_path: Path) -> None:
    model, _ = case("mag-parts", tmp_path)
    assert [(g.name, g.tokens, g.stride) for g in model.graphs(3)] == [
        ("prefill", 216, 72), ("segment", 72, 72), ("part", 36, 36), ("decode", 1, 1),
    ]  # fmt: skip
    model, _ = case("mal-segments-of-one", tmp_path)
    assert [(g.name, g.tokens, g.stride) for g in model.graphs(1)] == [("decode", 1, 1)]


def logits(path: Path, count: int = 20) -> Tensor:
    model = load(path).model
    return model.feed(tokens_of(count), model.initial_state(1), 0)[0]


def test_every_form_of_a_checkpoint_gives_the_same_model(tmp_path: Path) -> None:
    config = {**BASE, "ffn_mult": 4.0, "memory_hidden_mult": 4.0, "memory_lr": 0.1}
    tensors = tensors_of("mal", config)
    wanted = logits(save(tmp_path / "hub", "mal", config, tensors))
    training = {name: config[name] for name in config if name.startswith(("dim", "num_", "vocab", "chunk", "window"))}
    del training["num_memory_tokens"]
    training |= {"model_type": "mal", "tokenizer": "gpt2", "seq_len": 4096, "lr": 4e-4, "resume": None}
    compiled = {f"_orig_mod.{name}": value for name, value in tensors.items()}
    extra = {"optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "global_step": 7}
    torch.save({"model_state_dict": tensors, "config": config, "model_type": "mal"}, tmp_path / "plain.pt")
    torch.save({"model_state_dict": compiled, "config": training, **extra}, tmp_path / "pretrain.pt")
    torch.save({"model_state_dict": tensors, "config": training, "model_type": "mal"}, tmp_path / "distributed.pt")
    wrapped = {f"model.{name}": value for name, value in tensors.items()}
    hyper = {"config": config, "model_type": "mal", "lr": 1e-4}
    torch.save({"state_dict": wrapped, "hyper_parameters": hyper, "optimizer_states": []}, tmp_path / "last.ckpt")
    for name in ("plain.pt", "pretrain.pt", "distributed.pt", "last.ckpt"):
        assert torch.equal(logits(tmp_path / name), wanted)
    from safetensors.torch import save_file

    safe = tmp_path / "safe"
    safe.mkdir()
    save_file({name: value for name, value in tensors.items() if name != "head.weight"}, safe / "model.safetensors")
    (safe / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
    assert torch.equal(logits(safe), wanted)
    untied = {name: value for name, value in tensors.items() if name != "embed.weight"}
    save_file(untied, safe / "model.safetensors")
    (safe / "tokenizer.json").write_text("{}")
    assert torch.equal(logits(safe), wanted)
    loaded = load(safe)
    assert (loaded.format, loaded.tokenizer) == ("titans-pytorch-mlx", safe / "tokenizer.json")
    assert loaded.model.variant == "mal"
    json.dumps(loaded.model.config_json())


def test_a_configuration_that_is_given_is_the_one(tmp_path: Path) -> None:
    tensors = tensors_of("lmm", BASE)
    path, given = tmp_path / "weights.pt", tmp_path / "other.json"
    torch.save({"model_state_dict": tensors, "config": BASE, "model_type": "lmm"}, path)
    shorter = {**BASE, "chunk_size": 4}
    given.write_text(json.dumps({"model_type": "lmm", "titans_config": shorter}))
    model = load(path, LoadOptions(config=str(given))).model.double()
    tokens = tokens_of(20)
    got = model.feed(tokens, model.initial_state(1), 0)[0][0]
    assert error(got, Oracle("lmm", shorter, tensors).stream(tokens[0])) < TOLERANCES["cpu", "float64"]
    with pytest.raises(CheckpointError, match=r"no file .*nowhere\.json"):
        load(path, LoadOptions(config=str(tmp_path / "nowhere.json")))
    with pytest.raises(UsageError, match="--bug-compatible"):
        load(path, LoadOptions(bug_compatible=3))


def test_weights_in_bfloat16_become_float32(tmp_path: Path) -> None:
    config = dict(BASE)
    tensors = {name: value.bfloat16() for name, value in tensors_of("mag", config).items()}
    got = logits(save(tmp_path / "half", "mag", config, tensors))
    wanted = Oracle("mag", config, tensors).stream(tokens_of(20)[0])
    assert got.dtype == torch.float32
    assert (got[0] - wanted).abs().max() < TOLERANCES["cpu", "float32"]


def test_mac_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "mac", "mac", BASE, tensors_of("mag", BASE))
    with pytest.raises(CheckpointError, match=r"model_type 'mac': its logits depend on later tokens"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 15}, "dim: expected a multiple of num_heads"),
        ({"dim": 16, "num_heads": 16}, "dim / num_heads: expected an even number"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1"),
        ({"window_size": True}, "window_size: expected type int"),
        ({"memory_lr": 0.0}, "memory_lr: expected a number in"),
        ({"memory_lr": math.nan}, "NaN is not a JSON number"),
        ({"memory_momentum": 1.0}, "memory_momentum: expected a number in"),
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"ffn_mult": 0.01}, "ffn_mult: expected a width"),
        ({"attention": "flash"}, "unknown field of TitansConfig: attention"),
        ({"num_layers": 3}, "tensor 'blocks.2."),
        ({"num_layers": 1}, "a tensor that the model lacks"),
        ({"vocab_size": 30}, "embed.weight has another shape"),
        ({"use_conv": False}, "conv_k"),
    ],
)
def test_configurations_that_are_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint", "mag", {**BASE, **changes}, tensors_of("mag", BASE))
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_checkpoints_that_are_damaged(tmp_path: Path) -> None:
    tensors = tensors_of("mal", BASE)
    good = save(tmp_path / "good", "mal", BASE, tensors)

    def refuses(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load(path)

    refuses(tmp_path / "nowhere", "no such file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(empty, "no weights in .*: expected model.safetensors, pytorch_model.bin")
    both = save(tmp_path / "both", "mal", BASE, tensors)
    (both / "model.pt").write_bytes(b"")
    refuses(both, "several files of weights in .*: model.pt, pytorch_model.bin")
    alone = tmp_path / "alone.pt"
    torch.save(tensors, alone)
    refuses(alone, "no file .*config.json")
    cut = tmp_path / "cut.pt"
    cut.write_bytes((good / "pytorch_model.bin").read_bytes()[:3000])
    refuses(cut, "truncated file")
    (tmp_path / "empty.pt").write_bytes(b"")
    refuses(tmp_path / "empty.pt", "damaged file")
    (tmp_path / "cut.safetensors").write_bytes(b"\1\0")
    refuses(tmp_path / "cut.safetensors", "damaged file")
    torch.save([1], tmp_path / "list.pt")
    refuses(tmp_path / "list.pt", "no state dict in .*, got a list")
    torch.save({"model_state_dict": 3, "config": BASE, "model_type": "mal"}, tmp_path / "number.pt")
    refuses(tmp_path / "number.pt", "no state dict in .*, got keys model_state_dict, config")
    torch.save({"model_state_dict": tensors, "config": {"model_type": "mal"}}, tmp_path / "short.pt")
    refuses(tmp_path / "short.pt", "has no 'dim'")
    torch.save({"model_state_dict": tensors, "config": BASE}, tmp_path / "untyped.pt")
    refuses(tmp_path / "untyped.pt", "model_type: expected one of lmm, mag, mal, got None")
    for name, change, message in (
        ("untied", {"head.weight": tensors["head.weight"] + 1}, "head.weight differs from embed.weight"),
        ("nan", {"norm.weight": tensors["norm.weight"] * math.nan}, "NaN or infinity in tensor norm.weight"),
        ("integers", {"norm.weight": torch.ones(16, dtype=torch.int64)}, "wrong dtype of tensor norm.weight"),
    ):
        refuses(save(tmp_path / name, "mal", BASE, {**tensors, **change}), message)
    (good / "config.json").write_text("{")
    refuses(good, "not readable JSON")
    (good / "config.json").write_text(json.dumps({"model_type": "mal", **BASE}))
    refuses(good, "titans_config")


class Trap:
    """Its unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_runs(tmp_path: Path) -> None:
    path, trap = tmp_path / "trap.pt", tmp_path / "sprung"
    torch.save({"model_state_dict": tensors_of("mal", BASE), "config": Trap(trap)}, path)
    with pytest.raises(CheckpointError, match=r"would run code, .*getattr \(no code was run\)"):
        load(path)
    path.write_bytes(pickle.dumps(Trap(trap), protocol=2))
    with pytest.raises(CheckpointError):
        load(path)
    assert not trap.exists()
