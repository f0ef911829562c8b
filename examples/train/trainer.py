"""A training loop that survives kills: progress is saved to disk, and a restart continues from there.

Every batch depends only on the seed and the step, so a resumed run matches an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_export.checkpoints.titans import WEIGHTS, save
from titans_export.files import replacing_file
from titans_export.model import Titans


@dataclass
class Settings:
    """Duration, speed and output of a training run."""

    output: Path
    steps: int
    seed: int
    learning_rate: float = 3e-3
    matrix_learning_rate: float | None = None  # for Muon; None: AdamW for all parameters
    warmup: int = 50
    decay_from: float = 0.5  # share of the steps after which the learning rate falls linearly
    save_every_s: float = 60.0
    record: dict[str, Any] = field(default_factory=dict)  # stored in training.json


def _optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = []
    if settings.matrix_learning_rate is not None:
        hidden = (n for n, p in named.items() if p.ndim == 2 and n.startswith("layers."))
        matrices = [n for n in hidden if not n.endswith(("conv.weight", "norm.weight", "persistent", "gates.weight"))]
    rest = [p for n, p in named.items() if n not in set(matrices)]
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    ]
    if matrices:
        assert settings.matrix_learning_rate is not None
        chosen = [named[n] for n in matrices]
        result.append(torch.optim.Muon(chosen, lr=settings.matrix_learning_rate, weight_decay=0.01, momentum=0.95))
    return result


def _rate(step: int, settings: Settings) -> float:
    done = step / settings.steps
    fall = 1.0 if done < settings.decay_from else max(0.03, (1 - done) / (1 - settings.decay_from))
    return min(1.0, (step + 1) / settings.warmup) * fall


class Task:
    """The training task: the loss of one step, and the state to save besides model and optimisers."""

    def loss(self, step: int) -> Tensor:
        raise NotImplementedError

    def report(self) -> str:
        return ""

    def finished(self) -> bool:
        return False

    def result(self) -> dict[str, Any]:
        """Final measurements, stored in training.json."""
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""


def train(model: Titans, settings: Settings, task_for: Callable[[Titans], Task]) -> None:
    """Trains the model. Writes config.json, model.safetensors and training.json to settings.output."""
    settings.output.mkdir(parents=True, exist_ok=True)
    resume = settings.output / "resume.pt"
    # A resumed run must match these. The number of steps may change: it only moves the fall of the learning rate.
    made_of = json.dumps({"seed": settings.seed, "model": model.config.to_json(), **settings.record}, sort_keys=True)
    optimizers = _optimizers(model, settings)
    base = [[group["lr"] for group in o.param_groups] for o in optimizers]
    task, done, seconds = task_for(model), 0, 0.0
    skipped, smooth = 0, None
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        if saved["made_of"] != made_of:
            raise click.UsageError(
                f"{resume} is of a run with other data or settings; remove it or give another --output"
            )
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        task.restore(saved["task"])
        done, seconds, skipped, smooth = (saved[name] for name in ("step", "seconds", "skipped", "smooth"))
    start = done

    def keep() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "task": task.state(),
            "step": done,
            "seconds": seconds + time.monotonic() - began,
            "skipped": skipped,
            "smooth": smooth,
            "made_of": made_of,
        }
        with replacing_file(resume) as aside:
            torch.save(state, aside)

    began = last = time.monotonic()
    for step in _progress(start, settings.steps):
        if task.finished():
            break
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _rate(step, settings)
        model.zero_grad(set_to_none=True)
        loss = task.loss(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        else:
            skipped += 1
        bits = loss.item() / math.log(2)
        smooth = bits if smooth is None else 0.98 * smooth + 0.02 * bits
        if step % 20 == 0:
            tqdm.write(f"step {step}: {smooth:.4f} bits, |gradient| {norm:.2f}, skipped {skipped}{task.report()}")
        done = step + 1
        if time.monotonic() - last > settings.save_every_s:
            keep()
            last = time.monotonic()
    keep()
    save(model, settings.output)
    minutes = (seconds + time.monotonic() - began) / 60
    record = {
        **settings.record,
        "torch": torch.__version__,
        "seed": settings.seed,
        "steps": done,
        "minutes": round(minutes, 1),
        "skipped": skipped,
        "weights_sha256": hashlib.sha256((settings.output / WEIGHTS).read_bytes()).hexdigest(),
        **task.result(),
    }
    with replacing_file(settings.output / "training.json") as aside:
        aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _progress(start: int, steps: int) -> Iterator[int]:
    bar: Iterator[int] = tqdm(range(start, steps), initial=start, total=steps, unit="step", mininterval=5.0)
    return bar
