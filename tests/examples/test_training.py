"""Training: a kill loses nothing, batches are a matter of seed and step, and what is shipped keeps its promises."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recall_task
import torch

from titans_export.checkpoints import titans
from titans_export.model import MemoryConfig, Titans

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "train"
CHECKPOINTS = ROOT / "examples" / "checkpoints"
sys.path.append(str(TRAIN))

import train_bytes  # noqa: E402
import train_recall  # noqa: E402
from trainer import Task  # noqa: E402

STEPS = 12
# Trains a tiny model and prints a line for every step; `argv` is the folder and the pause after each step.
SCRIPT = f"""
import sys, time
from dataclasses import replace
from pathlib import Path
import torch
sys.path[:0] = [{str(TRAIN)!r}, {str(ROOT)!r}]
from trainer import Settings, train
from train_bytes import CONFIG, Streams
from titans_export.model import MemoryConfig, Titans

torch.set_num_threads(1)
torch.manual_seed(0)
memory = MemoryConfig(heads=2, head_dim=8, chunk=8)
tiny = replace(CONFIG, dim=16, layers=2, hidden=16, memory=memory, memory_layers=(0,), attention_heads=2, window=16)
model = Titans(tiny)
data = torch.arange(4000).mul(7).remainder(256).to(torch.uint8)

class Slow(Streams):
    def loss(self, step):
        print(step, flush=True)
        time.sleep(float(sys.argv[2]))
        return super().loss(step)

settings = Settings(Path(sys.argv[1]), {STEPS}, 0, matrix_learning_rate=0.02, warmup=2, save_every_s=0.0)
train(model, settings, lambda m: Slow(m, data, 0, 4, 32, 3, True))
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train(output: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(output), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _finish(process: subprocess.Popen[str]) -> list[int]:
    """Waits for the end; the steps it took."""
    steps = [int(line) for line in process.communicate()[0].splitlines() if line.isdigit()]
    assert process.returncode == 0
    return steps


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole")
    killed = _train(tmp_path / "killed", pause=0.2)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.strip() == "5":
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    resumed = _finish(_train(tmp_path / "killed"))
    assert resumed == list(range(resumed[0], STEPS))
    assert resumed[0] >= 5
    assert _finish(whole) == list(range(STEPS))
    ends = [titans.load(tmp_path / name).model.state_dict() for name in ("whole", "killed")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    record = json.loads((tmp_path / "killed" / "training.json").read_text())
    assert record["steps"] == STEPS
    assert record["weights_sha256"] == titans.load(tmp_path / "killed").weights_sha256


def _losses(task: Task, noise: int) -> list[float]:
    """Losses of a few steps, with the global random state set to `noise`."""
    torch.manual_seed(noise)
    np.random.seed(noise)
    return [task.loss(step).item() for step in range(3)]


def test_batches_depend_on_seed_and_step() -> None:
    tiny = {"dim": 16, "layers": 1, "hidden": 16, "memory_layers": None, "memory": MemoryConfig(2, 8, 16), "window": 16}
    model = Titans(replace(train_recall.CONFIG, **tiny))
    first, same, other = (_losses(train_recall.Recall(model, seed), noise) for noise, seed in enumerate((0, 0, 1)))
    assert first == same != other
    assert train_recall.Recall(model, 0).loss(2).item() == first[2]

    model, data = Titans(replace(train_bytes.CONFIG, **tiny)), torch.arange(999).remainder(251).to(torch.uint8)
    first, same, other = (
        _losses(train_bytes.Streams(model, data, seed, 2, 32, 2, True), noise) for noise, seed in enumerate((0, 0, 1))
    )
    assert first == same != other


@pytest.mark.parametrize(("pairs", "filler", "lead"), [(1, 0, 0), (16, 256, 7), (64, 5, 1)])
def test_answers_of_the_recall_task(pairs: int, filler: int, lead: int) -> None:
    tokens, queries, answers = recall_task.make_episodes(3, pairs, filler, 5, lead)
    assert tokens.shape == (3, lead + recall_task.episode_length(pairs, filler))
    assert answers.shape == (3, pairs)
    for row, right in zip(tokens.tolist(), answers.tolist(), strict=True):
        start = row.index(recall_task.START)
        assert start == lead
        told = row[start + 1 : start + 1 + 2 * pairs]
        values = dict(zip(told[::2], told[1::2], strict=True))
        assert len(values) == pairs
        assert [values[row[place]] for place in queries] == right
        assert [row[place + 1] for place in queries] == right
        noise = row[:lead] + row[start + 1 + 2 * pairs : -2 * pairs]
        assert len(noise) == lead + filler
        assert all(recall_task.FIRST_FILLER <= token < recall_task.START for token in noise)
        assert all(token < recall_task.KEYS for token in values)
        assert all(recall_task.FIRST_VALUE <= token < recall_task.FIRST_FILLER for token in right)
    assert max(map(max, tokens.tolist())) < recall_task.VOCAB_SIZE


def test_recall_episodes_depend_on_their_seed() -> None:
    first, same, other = (recall_task.make_episodes(2, 4, 8, seed).tokens for seed in ([1, 2], [1, 2], [1, 3]))
    assert (first == same).all()
    assert (first != other).any()


def test_the_shipped_model_recalls() -> None:
    model = titans.load(CHECKPOINTS / "recall").model
    assert model.config.window < 256
    learning, frozen = (train_recall.accuracy(model, 16, 256, 24, seed=1, learn=on) for on in (True, False))
    assert learning >= 0.95
    assert frozen < 0.05


@pytest.mark.parametrize("name", ["recall", "mac-bytes"])
def test_shipped_checkpoints_say_what_they_are(name: str) -> None:
    checkpoint = titans.load(CHECKPOINTS / name)
    assert checkpoint.model.config.name == name
    record = json.loads((CHECKPOINTS / name / "training.json").read_text())
    assert record["weights_sha256"] == checkpoint.weights_sha256
    assert {"script", "seed", "steps", "minutes"} <= set(record)
