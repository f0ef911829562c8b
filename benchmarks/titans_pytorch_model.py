"""Benchmarks a whole titans-pytorch model against the library, and profiles the runtime.

    python -m benchmarks.titans_pytorch_model                         measures and writes a result file
    python -m benchmarks.titans_pytorch_model --export --rounds 5     exports the bundle again first
    python -m benchmarks.titans_pytorch_model --profile               only profiles the runtime

The model is that of the library's script train_mac.py with random weights, exported to build/bench. The baselines are
the runtime, the same mathematics in PyTorch (torch.compile and eager), and the library.

First all logits of a stream are compared with the golden ones; the library's are those of its parallel forward. The
exit code is 3 if a baseline is incorrect. The library's cached decoding deviates from its parallel forward, so its
error is only reported.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import limits, table
from benchmarks.operator_times import profile
from benchmarks.report import RESULTS, ROOT, provenance, write
from titans_export.bench import KINDS
from titans_export.bench.comparison import Baseline, Result, ratios
from titans_export.bench.interleaved import interleave
from titans_export.bench.machine import QUIET, cores, others_busy
from titans_export.bench.models import Logits, Measured, PyTorch, Runtime, Tokens
from titans_export.bench.statistics import Passes, summarise
from titans_export.bench.worker import Worker, WorkerError
from titans_export.bundle import Bundle, read_bundle
from titans_export.manifest import read_manifest
from titans_export.verifying import Distance

FORMAT = "titans-pytorch"
NAMES = ("runtime", "pytorch-compile", "pytorch-eager", "titans-pytorch")
WRONG = 3
CHECKED = 192  # tokens
CHECKED_PROMPT = 64  # tokens before the library's cached decoding begins
WARM_UP = 8  # uncounted tokens of each decode pass
# Approximate duration of one timed block, which has at least one pass.
TURN_S, MOST_PASSES = 0.5, 20
_HERE = "benchmarks.titans_pytorch_model"


@dataclass(frozen=True)
class Subject:
    """The measured model: its weights, their description for `--config`, and their bundle."""

    name: str
    weights: Path
    config: str
    bundle: Path


@dataclass(frozen=True)
class Plan:
    """Tokens of the prefill and of the prompt, tokens decoded after the prompt, rounds, and threads of every
    baseline.
    """

    prompt_tokens: int
    decode_tokens: int
    rounds: int
    threads: int


class Stretches(Measured):
    """The timed stretches, equal for all baselines: prefill from a new stream, and decode from the prompt's end.

    Subclasses save and restore the stream; that time does not count.
    """

    def keep(self) -> None:
        """Saves the stream."""
        raise NotImplementedError

    def go_back(self) -> None:
        """Restores the saved stream."""
        raise NotImplementedError

    def begin(self, prompt: Tokens) -> None:
        """Reads the prompt and saves the stream after it."""
        self.start()
        self.reset()
        self.feed(prompt)
        self.keep()

    def prefill(self, tokens: Tokens, passes: int) -> Passes:
        taken = []
        for _ in range(1 + passes):
            self.reset()
            began = time.perf_counter_ns()
            self.feed(tokens)
            taken.append([time.perf_counter_ns() - began])
        return taken[1:]

    def decode(self, tokens: Tokens, passes: int) -> Passes:
        timed: list[list[int]] = []
        for count in (min(WARM_UP, len(tokens)), *[len(tokens)] * passes):
            self.go_back()
            taken = []
            for token in tokens[:count]:
                began = time.perf_counter_ns()
                self.step(int(token))
                taken.append(time.perf_counter_ns() - began)
            timed.append(taken)
        return timed[1:]


class RuntimeStretches(Runtime, Stretches):
    """The runtime with its kernels."""

    def __init__(self, bundle: Path, threads: int) -> None:
        super().__init__(bundle, "cpu", None, threads, "require")
        self._kept = self._stream

    def keep(self) -> None:
        self._kept = self._stream
        self._stream = self._kept.fork()

    def go_back(self) -> None:
        self._stream.close()
        self._stream = self._kept.fork()


class PyTorchStretches(PyTorch, Stretches):
    """The same mathematics in PyTorch, eager or compiled. No call changes a state in place."""

    def keep(self) -> None:
        self._kept = self._state, self._position

    def go_back(self) -> None:
        self._state, self._position = self._kept

    def flop_per_token(self, tokens: int) -> float:
        """FLOP per token of the matmuls, as PyTorch counts them; masked squares count in full."""
        from torch.utils.flop_counter import FlopCounterMode

        self.reset()
        with FlopCounterMode(display=False) as counter:
            self.feed(np.zeros(tokens, np.int32))
        return float(counter.get_total_flops()) / tokens


class Library(Stretches):
    """titans-pytorch: the parallel forward over many tokens, and cached decoding as in its `sample`."""

    def __init__(self, weights: Path, config: str, threads: int, longest: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = build(arguments_of(config))
        self._model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
        self._model.eval()
        rows = self._model.seq_len_with_longterm_mem(longest)
        axial = self._model.axial_pos_emb
        with torch.no_grad():  # one context for the whole text, as in `sample`
            sizes = axial.maybe_derive_outer_dim(rows, (self._model.neural_memory_segment_len,))
            self._positions = axial(sizes, return_factorized=True)
        self.reset()

    def prepare(self) -> dict[str, Any]:
        return {"torch": self._torch.__version__}

    def reset(self) -> None:
        self._text = self._torch.zeros(1, 0, dtype=self._torch.long)
        self._cache: Any = None

    def keep(self) -> None:
        """Saves the state that decoding starts from; prefill keeps no cache."""
        with self._torch.no_grad():
            self._kept_cache = self._forward(None)[1]
        self._kept_text = self._text

    def go_back(self) -> None:
        self._text, self._cache = self._kept_text, self._kept_cache

    def feed(self, tokens: Tokens) -> Logits:
        if self._text.shape[1]:
            raise ValueError("the stream has read tokens; reset it first")
        self._text = self._torch.from_numpy(tokens.astype(np.int64))[None]
        with self._torch.no_grad():
            logits: Logits = self._model(self._text, disable_flex_attn=True)[0].numpy()
        return logits

    def step(self, token: int) -> Logits:
        torch = self._torch
        with torch.no_grad():
            self._text = torch.cat([self._text, torch.tensor([[token]])], 1)
            while True:  # longterm rows before the token return no logits
                logits, self._cache = self._forward(self._cache)
                if logits is not None:
                    row: Logits = logits[0, -1].numpy()
                    return row

    def _forward(self, cache: Any) -> tuple[Any, Any]:
        positions = self._positions
        result: tuple[Any, Any] = self._model(
            self._text, disable_flex_attn=True, cache=cache, return_cache=True, factorized_pos_emb=positions
        )
        return result

    def decoded_logits(self, tokens: Tokens, prompt: int) -> Logits:
        """The logits after each token that follows the prompt, by cached decoding."""
        self.reset()
        self.feed(tokens[:prompt])
        self.keep()
        self.go_back()
        return np.stack([self.step(int(token)) for token in tokens[prompt:]])

    def state_bytes(self) -> int:
        from benchmarks.baselines.titans_pytorch import _bytes

        return _bytes(self._kept_cache[1:])


def arguments_of(config: str) -> dict[str, Any]:
    """The constructor's arguments, from a JSON file or a built-in name."""
    import titans_export.checkpoints.titans_pytorch as format

    path = Path(config)
    if not path.suffix:
        path = Path(str(format.__file__)).parent / f"{config}.json"
    arguments: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return arguments


def build(arguments: dict[str, Any]) -> Any:
    """Builds the library's model with these arguments."""
    import torch
    from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

    rest = {name: value for name, value in arguments.items() if name not in ("class", "version")}
    network = {name: value for name, value in rest.pop("neural_memory_model").items() if name != "type"}
    rest["neural_memory_layers"] = tuple(rest["neural_memory_layers"])
    # GPU-only implementations of the same mathematics.
    rest |= {"use_flex_attn": False}
    rest["neural_memory_kwargs"] = {**rest["neural_memory_kwargs"], "use_accelerated_scan": False}
    model = MemoryAsContextTransformer(neural_memory_model=MemoryMLP(**network), **rest)
    for parameter in model.parameters():
        # The heads' initial memories are views of one tensor, so loading would write through each of them.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def make_weights(path: Path, config: str) -> None:
    """Writes random weights: the library's initial values plus small noise, because many of them are zero."""
    import torch

    from titans_export.files import replacing_file

    torch.manual_seed(0)
    model = build(arguments_of(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("rotary_emb.freqs"):  # these are never trained
                parameter += 0.02 * torch.randn_like(parameter)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as aside:
        torch.save(model.state_dict(), aside)


def provide(subject: Subject, anew: bool) -> Bundle:
    """The subject's bundle and weights. The bundle is exported if older than the weights; missing weights are made."""
    if not subject.weights.is_file():
        _say(f"making {subject.weights.name}")
        make_weights(subject.weights, subject.config)
    manifest = subject.bundle / "manifest.json"
    if anew or not manifest.is_file() or manifest.stat().st_mtime < subject.weights.stat().st_mtime:
        from titans_export.exporting import export_checkpoint

        # Random weights make a chaotic memory: over more positions, float32 PyTorch also diverges from float64.
        options: dict[str, Any] = {"format": FORMAT, "config": subject.config, "overwrite": True, "positions": CHECKED}
        export_checkpoint(subject.weights, subject.bundle, progress=_say, **options)
    return read_bundle(subject.bundle)


def baselines(subject: Subject, plan: Plan) -> list[Baseline]:
    """The baselines that take part; the reference for ratios comes first."""
    pytorch = [subject.weights, read_manifest(subject.bundle).model, plan.threads]
    longest = max(CHECKED, plan.prompt_tokens + plan.decode_tokens)
    compiled = "the same mathematics in PyTorch through torch.compile"
    return [
        Baseline(
            "runtime", "the runtime with its kernels", f"{_HERE}:RuntimeStretches", (subject.bundle, plan.threads)
        ),
        Baseline("pytorch-compile", compiled, f"{_HERE}:PyTorchStretches", (*pytorch, True, subject.config, None)),
        Baseline(
            "pytorch-eager",
            "the same mathematics in PyTorch",
            f"{_HERE}:PyTorchStretches",
            (*pytorch, False, subject.config, None),
        ),
        Baseline(
            "titans-pytorch",
            "the library's parallel forward, and its cached decoding",
            f"{_HERE}:Library",
            (subject.weights, subject.config, plan.threads, longest),
        ),
    ]


def measure(bundle: Bundle, taking_part: list[Baseline], plan: Plan) -> tuple[list[Result], float | None]:
    """Checks all baselines, then measures them if none is wrong. Returns the results and the FLOP per token."""
    results, flop = [Result(baseline) for baseline in taking_part], None
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for result in results:
            baseline = result.baseline
            _say(f"preparing and checking {baseline.name}: {baseline.what}")
            began = time.monotonic()
            try:
                worker = stack.enter_context(Worker(baseline.target, *baseline.args, threads=plan.threads))
                result.notes = worker.call("prepare")
                result.setup_s = round(time.monotonic() - began, 2)
                check(bundle, worker, result)
                if baseline.name == "pytorch-eager":
                    flop = worker.call("flop_per_token", plan.prompt_tokens)
            except WorkerError as error:
                result.unavailable = str(error)
            else:
                workers[baseline.name] = worker
        if all(result.passed for result in results if result.baseline.name in workers):
            _measure(bundle, {r.baseline.name: r for r in results}, workers, plan)
    return results, flop


def check(bundle: Bundle, worker: Worker, result: Result) -> None:
    """Compares with the golden logits: fed at once and, except for the library, also token by token."""
    golden = bundle.golden()
    tokens = golden.inputs[:CHECKED]
    is_library = result.baseline.target.endswith(":Library")
    distance = Distance()
    for one_by_one in (False,) if is_library else (False, True):
        distance.add(golden.errors(worker.call("all_logits", tokens, one_by_one), 0), 0, bundle.tolerance)
    result.max_abs_error, result.first_bad_position = distance.max_abs_error, distance.first_bad_position
    result.passed = distance.first_bad_position is None
    if is_library:
        decoded = worker.call("decoded_logits", tokens, CHECKED_PROMPT)
        result.notes["max_abs_error_of_cached_decoding"] = float(golden.errors(decoded, CHECKED_PROMPT).max())


def _measure(bundle: Bundle, results: dict[str, Result], workers: dict[str, Worker], plan: Plan) -> None:
    vocabulary = bundle.manifest.input.width
    count = plan.prompt_tokens + plan.decode_tokens
    tokens: Tokens = np.random.default_rng(0).integers(0, vocabulary, count, np.int32)
    for worker in workers.values():
        worker.call("begin", tokens[: plan.prompt_tokens])
    for kind, part in zip(KINDS, (tokens[: plan.prompt_tokens], tokens[plan.prompt_tokens :]), strict=True):
        _say(f"measuring {kind}, {plan.rounds} rounds of {len(workers)} baselines, {len(part)} tokens a pass")
        passes = {name: _passes(worker, kind, part) for name, worker in workers.items()}
        rounds = interleave(
            {name: partial(worker.call, kind, part, passes[name]) for name, worker in workers.items()}, plan.rounds
        )
        for name, own in rounds.items():
            results[name].speeds[kind] = summarise(own, len(part))
    for name, worker in workers.items():
        memory = worker.call("memory")
        results[name].state_bytes, results[name].peak_rss_bytes = memory["state_bytes"], memory["peak_rss_bytes"]


def _passes(worker: Worker, kind: str, tokens: Tokens) -> int:
    seconds: float = sum(worker.call(kind, tokens, 1)[0]) / 1e9
    return min(MOST_PASSES, max(1, round(TURN_S / max(seconds, 1e-9))))


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of weights that one decoded token reads: all of its graph's, but only one row of an embedding."""
    from safetensors import safe_open

    graph = bundle.manifest.graph("decode")
    total = 0
    with safe_open(bundle.path / bundle.manifest.weights.file, "np") as file:
        for name in graph.weights:
            value = file.get_tensor(name)
            total += value.nbytes // (len(value) if "embedding" in name and value.ndim == 2 else 1)
    return total


def shares(speeds: dict[str, float], limit: dict[str, Any], read_bytes: int, flop: float | None) -> dict[str, float]:
    """The shares of the machine's limits that these speeds, in tokens per second by kind, reach."""
    peaks = {"decode": limit["bandwidth_gb_s"][str(read_bytes)]["read"] * 1e9 / read_bytes}
    if flop is not None:
        peaks["prefill"] = limit["sgemm_gflops"] * 1e9 / flop
    return {kind: rate / peaks[kind] for kind, rate in speeds.items() if kind in peaks}


def machine_limits(threads: int, read_bytes: int) -> dict[str, Any]:
    """The machine's limits, including reads of a decoded token's size."""
    found = limits.measure([], threads)
    found["bandwidth_gb_s"] |= limits.bandwidth(threads, [read_bytes])
    return found


def run(subject: Subject, bundle: Bundle, taking_part: list[Baseline], plan: Plan) -> dict[str, Any]:
    """Measures everything and returns the result."""
    read_bytes = weight_bytes(bundle)
    _say("measuring the machine's limits")
    before, busy = machine_limits(plan.threads, read_bytes), others_busy()
    if busy > QUIET:
        _say(f"others keep {busy:.0%} of this machine busy: expect little of these numbers")
    results, flop = measure(bundle, taking_part, plan)
    _say("measuring the machine's limits again, and where the time goes")
    limit = limits.best(before, machine_limits(plan.threads, read_bytes))
    entries = []
    for result in results:
        entry = _entry(result)
        rates = {kind: speed.tokens_per_second for kind, speed in result.speeds.items()}
        entry["share_of_limit"] = shares(rates, limit, read_bytes, flop)
        entries.append(entry)
    return {
        "benchmark": FORMAT,
        "name": subject.name,
        "parameters": bundle.manifest.model.parameters,
        "passed": all(result.passed for result in results if result.unavailable is None),
        "tolerance": bundle.tolerance,
        "checked_tokens": CHECKED,
        "ratios": ratios(results),
        **dataclasses.asdict(plan),
        "prefill_tokens": plan.prompt_tokens,
        "others_busy": busy,
        "flop_per_token": flop,
        "weight_bytes_per_token": read_bytes,
        "limits": limit,
        "baselines": entries,
        "profile": profile(bundle, plan.threads, plan.prompt_tokens),
        **provenance(),
    }


def _entry(result: Result) -> dict[str, Any]:
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    baseline, speeds = fields.pop("baseline"), fields.pop("speeds")
    by_kind = {kind: dataclasses.asdict(speeds[kind]) if kind in speeds else None for kind in KINDS}
    return {"name": baseline.name, "what": baseline.what, **fields, **by_kind}


def _say(text: str) -> None:
    click.echo(f"benchmarks: {text}", err=True)


def subject_in(folder: Path) -> Subject:
    """The library's own example model, in this folder."""
    return Subject("train-mac", folder / "train-mac.pt", "train_mac", folder / "train-mac.titans")


@click.command(help=__doc__)
@click.option(
    "--baseline", "chosen", multiple=True, type=click.Choice(NAMES), help="Run only this baseline; repeatable."
)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option(
    "--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prefill and of the prompt."
)
@click.option("--decode-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads per baseline.  [default: all cores]")
@click.option("--export", "anew", is_flag=True, help="Export the bundle again; takes minutes.")
@click.option("--profile", "profile_only", is_flag=True, help="Only profile the runtime.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "build" / "bench")
@click.option("--output-folder", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=False)
def main(
    chosen: tuple[str, ...],
    rounds: int,
    prompt: int,
    decode_tokens: int,
    threads: int,
    anew: bool,
    profile_only: bool,
    folder: Path,
    output_folder: Path,
) -> None:
    subject, plan = subject_in(folder), Plan(prompt, decode_tokens, rounds, threads or cores())
    bundle = provide(subject, anew)
    if profile_only:
        click.echo(table.library_profile({"profile": profile(bundle, plan.threads, prompt)}))
        return
    taking_part = [c for c in baselines(subject, plan) if c.name in chosen or not chosen]
    result = run(subject, bundle, taking_part, plan)
    write(output_folder / f"cpu-{subject.name}-{result['date']}.json", result)
    parts: tuple[Callable[[dict[str, Any]], str], ...] = (table.library_ratios, table.library_speeds)
    click.echo("\n\n".join(make(result) for make in (*parts, table.library_profile)))
    if not result["passed"]:
        sys.exit(WRONG)


if __name__ == "__main__":
    main()
