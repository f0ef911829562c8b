"""The four variants: streams equal the parallel form, nothing looks ahead, gradients reach every parameter."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from cases import TOLERANCE_FLOAT64, random_cuts
from torch import Tensor

from titans_export.errors import CheckpointError
from titans_export.model import MemoryConfig, ModelConfig, Step, Titans, parse_config
from titans_export.model.cached_attention import phase_angles, phase_increments, rotate
from titans_export.model.float64 import Float64

VARIANTS = ("lmm", "mac", "mag", "mal")
MEMORIES = {
    "linear": MemoryConfig(2, 6, 4),
    "mlp2": MemoryConfig(2, 6, 4, depth=2, residual=True),
    # Small steps: a deep memory with LayerNorm over 6 values amplifies rounding chaotically with large ones.
    "mlp3-norm": MemoryConfig(2, 6, 4, depth=3, activation="gelu", residual=True, layer_norm=True, step_limit=0.1),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def small_config(variant: str, memory: MemoryConfig = MEMORIES["linear"], **changes: object) -> ModelConfig:
    attention = {} if variant == "lmm" else {"attention_heads": 2, "window": 12, "persistent": 3}
    return replace(ModelConfig(variant, 50, 16, 3, 24, memory, **attention), **changes)


def random_model(config: ModelConfig, seed: int = 0) -> Titans:
    """A model with every parameter away from its initial value, those that start at zero or one too."""
    torch.manual_seed(seed)
    model = Titans(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


@variants
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_any_cut_of_a_stream_equals_the_parallel_form(variant: str, memory: MemoryConfig) -> None:
    model = random_model(small_config(variant, memory))
    length = 67
    tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
    for way in ([length], [1] * length, random_cuts(length, seed=2)):
        state, at, out = model.initial_state(2), 0, []
        for cut in way:
            logits, state = model.feed(tokens[:, at : at + cut], state, at)
            out.append(logits)
            at += cut
        assert float((torch.cat(out, 1) - whole).abs().max()) < TOLERANCE_FLOAT64


@variants
def test_blocks_without_a_memory(variant: str) -> None:
    model = random_model(small_config(variant, memory_layers=(1,)))
    tokens = torch.randint(50, (1, 30))
    with torch.no_grad():
        whole = model(tokens)
    assert float((model.feed(tokens, model.initial_state(1), 0)[0] - whole).abs().max()) < TOLERANCE_FLOAT64
    assert [name for name in model.initial_state(1) if name.endswith("memory")] == ["layers.1.memory"]


@variants
def test_no_logit_depends_on_a_later_token(variant: str) -> None:
    model = random_model(small_config(variant))
    tokens = torch.randint(50, (1, 40))
    with torch.no_grad():
        before = model(tokens)
        for cut in (1, 3, 4, 11, 12, 13, 26, 39):
            changed = tokens.clone()
            changed[:, cut:] = (changed[:, cut:] + 7) % 50
            after = model(changed)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.allclose(before[:, cut], after[:, cut])


@variants
def test_the_memory_reaches_beyond_attention(variant: str) -> None:
    """A change far outside the window changes the logits while learning, and cannot through a frozen memory."""
    model = random_model(small_config(variant, layers=1))
    tokens = torch.randint(50, (1, 60))
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 9) % 50
    with torch.no_grad():
        assert float((model(tokens) - model(changed))[:, 50:].abs().max()) > 1e-9
        frozen = model(tokens, learn=False) - model(changed, learn=False)
        assert float(frozen[:, 50:].abs().max()) == 0.0


@variants
def test_streams_of_a_batch_may_stand_at_different_positions(variant: str) -> None:
    model = random_model(small_config(variant))
    tokens = torch.randint(50, (2, 40))
    starts, state, expected = (8, 20), [], []
    for row, start in enumerate(starts):
        one = tokens[row : row + 1]
        logits, before = model.feed(one[:, :start], model.initial_state(1), 0)
        expected.append(model.feed(one[:, start : start + 4], before, start)[0])
        state.append(before)
    both = {name: torch.cat([s[name] for s in state]) for name in state[0]}
    part = torch.stack([tokens[row, start : start + 4] for row, start in enumerate(starts)])
    with torch.no_grad():
        logits, _ = model.step(part, both, Step(torch.tensor(starts), None, aligned=True))
    assert float((logits - torch.cat(expected)).abs().max()) < TOLERANCE_FLOAT64


@variants
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_training_reaches_every_parameter(variant: str, memory: MemoryConfig) -> None:
    model = random_model(small_config(variant, memory)).train()
    tokens = torch.randint(50, (2, 30))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.T * q.shape[-1] ** -0.5, -1) @ v


def test_mac_attention_sees_what_equation_22_says() -> None:
    """One head, written out: persistent tokens, the retrieved rows and the tokens of the segment up to the token's
    place.
    """
    model = random_model(small_config("mac", attention_heads=1))
    attention = model.layers[0].attention
    x, h = (torch.randn(1, 36, 16, dtype=torch.float64) for _ in range(2))
    state, out = attention.initial_state(1), []
    for at in range(0, 36, 4):
        part = slice(at, at + 4)
        y, state = attention(x[:, part], h[:, part], state, Step(torch.tensor([at]), None, aligned=True))
        out.append(y)
    got = torch.cat(out, 1)[0]

    def turned(rows: Tensor, places: Tensor) -> Tensor:
        half = rows.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / rows.shape[-1])
        angle = places.unsqueeze(-1) * frequency
        a, b = rows[..., :half], rows[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    wq, wk, wv, wo = (w.weight for w in (attention.query, attention.key, attention.value, attention.out))
    for t in range(36):
        start = t // 12 * 12
        places = torch.arange(t - start + 1, dtype=torch.float64)
        seen_x, seen_h, first = x[0, start : t + 1], h[0, start : t + 1], attention.persistent
        keys = torch.cat([first @ wk, turned(seen_h @ wk, places), turned(seen_x @ wk, places)])
        values = torch.cat([first @ wv, seen_h @ wv, seen_x @ wv])
        query = turned(x[0, t : t + 1] @ wq, places[-1:])
        assert torch.allclose(got[t], (_attention(query, keys, values) @ wo)[0], atol=1e-8)


def _increments(width: int) -> torch.Tensor:
    return phase_increments(10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))[0]


def test_rotary_is_exact_at_any_position() -> None:
    """In float32 the angle at two billion tokens is that at the same phase near zero."""
    increments = _increments(32)
    turns = [(2_000_000_011 * int(i)) % 2**32 for i in increments]
    expected = (torch.tensor(turns, dtype=torch.float64) * 2 * torch.pi / 2**32).cos()
    far = phase_angles(torch.tensor([[2_000_000_011]]), increments, torch.float32).cos()
    assert float((far.flatten() - expected).abs().max()) < 1e-6
    exact = (255 * 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)).cos()
    near = phase_angles(torch.tensor([[255]]), increments, torch.float64).cos()
    assert float((near.flatten() - exact).abs().max()) < 1e-6


@pytest.mark.parametrize("rotary", ["halves", "pairs"])
def test_rotary_turns_pairs_as_complex_numbers(rotary: str) -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    position = torch.tensor([[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]])
    angle = position[:, None, :, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)
    found = rotate(x, phase_angles(position, _increments(8), torch.float64), rotary)
    if rotary == "halves":
        turned = torch.complex(*x.chunk(2, -1)) * turn
        expected = torch.cat([turned.real, turned.imag], -1)
    else:
        expected = torch.view_as_real(torch.view_as_complex(x.reshape(2, 3, 5, 4, 2)) * turn).reshape(x.shape)
    assert float((found - expected).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"variant": "mamba"}, "variant"),
        ({"dimm": 3}, "dimm"),
        ({"layers": 0}, "layers"),
        ({"dim": "16"}, "dim"),
        ({"window": 10}, "window"),
        ({"memory_layers": [5]}, "memory_layers"),
        ({"memory": {"heads": 2}}, "'activation' in memory"),
        ({"memory": asdict(MEMORIES["linear"]) | {"depth": 4}}, "depth"),
        ({"memory": asdict(MEMORIES["linear"]) | {"conv": 1}}, "conv"),
        ({"memory": asdict(MEMORIES["linear"]) | {"activation": "relu"}}, "activation"),
        ({"format_version": 2}, "format_version"),
        ({"attention_heads": 3}, "attention_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_configuration_is_named(change: dict[str, object], named: str) -> None:
    values = small_config("mac").to_json() | change
    with pytest.raises(CheckpointError, match=named):
        parse_config(values)


@pytest.mark.parametrize("key", small_config("mac").to_json())
def test_every_key_must_be_there(key: str) -> None:
    values = small_config("mac").to_json()
    del values[key]
    with pytest.raises(CheckpointError, match=key):
        parse_config(values)


@variants
def test_a_configuration_survives_json(variant: str) -> None:
    import json

    config = small_config(variant, memory_layers=(0, 2))
    assert parse_config(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("variant", ["lmm", "mac"])
def test_float64_mode_equals_a_float64_model(variant: str) -> None:
    model = random_model(small_config(variant, MEMORIES["mlp2"])).float()
    tokens = torch.randint(50, (1, 19), generator=torch.Generator().manual_seed(1))
    double = copy.deepcopy(model).double()
    expected, states = double.feed(tokens, double.initial_state(1), 0)
    with Float64():
        got, following = model.feed(tokens, model.initial_state(1), 0)
    assert torch.equal(got, expected)
    assert all(torch.equal(following[name], value) for name, value in states.items())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_float64_mode_ignores_casts_to_float32_and_refuses_to_write_outside() -> None:
    third = torch.ones((), dtype=torch.float64) / 3
    outside = torch.zeros(2)
    with Float64():
        assert torch.equal(third.float(), third)
        assert torch.zeros(1, dtype=torch.float32).dtype == torch.float64
        with pytest.raises(TypeError, match="writes into a float32 tensor"):
            outside.add_(third)
