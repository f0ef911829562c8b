"""`titans-export run`: reads a text, continues a prompt, or both."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..errors import UsageError
from ..files import check_file
from ..manifest import GUARD_POLICIES
from ..names import shown
from .command import Command, emit, json_option, note, say
from .kinds import check_state
from .options import (
    PATH,
    SessionOptions,
    bundle_argument,
    encoding_option,
    engine_option,
    key_option,
    open_session,
    restart_option,
    session_options,
)
from .progress import progress_bar
from .table import size

if TYPE_CHECKING:
    import titans_runtime

    from ..tokenizer import Tokenizer


GUARDS = ("bundle", *GUARD_POLICIES)
# What a policy does after a violation, for notes.
ACTIONS = {
    "raise": "the call failed",
    "freeze": "the memory has stopped learning",
    "skip": "the memory skips the chunk and learns on",
    "rewind": "the memory returns to its last healthy mark and learns on",
    "decay": "the memory goes half of the way back to its initial state and learns on",
    "restart": "the memory is reset and learns on",
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled: the arguments of `titans_runtime.Stream.generate`."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class RunOptions(SessionOptions):
    """The options of `run`."""

    bundle: Path
    prompt: str | None
    text: Path | None
    state: Path | None
    key_file: Path | None
    encoding_errors: str
    hide_special_tokens: bool
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: tuple[str, ...]
    freeze: bool
    restart_every: int
    as_json: bool

    def sampling(self) -> Sampling:
        """The options of sampling alone."""
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed)


@click.command(
    cls=Command,
    bundles=True,
    examples=(
        'titans-export run mac.titans --prompt "To be, or not" --temperature 0.8',
        "titans-export run mac.titans --text book.txt --json",
        'titans-export run mac.titans --text book.txt --prompt "The end of it was" --stop "."',
        "titans-export run mac.titans --text monday.txt --state user.tstate",
        "echo -n Once | titans-export run mac.titans --seed 7",
    ),
)
@bundle_argument
@click.option("--prompt", help="Text to continue.  [default: stdin, if it is not a terminal and there is no --text]")
@click.option("--text", type=PATH, help="File to read, - for stdin; with --prompt the model reads it first.")
@click.option(
    "--state",
    type=PATH,
    metavar="FILE.tstate",
    help="Continue the stream in this file if it exists, and save the stream to it at the end.",
)
@key_option
@encoding_option
@click.option("--max-tokens", type=click.IntRange(0), default=256, help="Maximum number of tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, help="Sampling temperature; 0: always the top-1.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Sample from the k most probable tokens; 0: from all.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Sample from the most probable tokens that add up to p.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Leave out tokens below p times the top-1 probability.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Seed of the sampling.")
@click.option("--stop", multiple=True, help="Stop after this text has been generated; repeatable.")
@click.option("--hide-special-tokens", is_flag=True, help="Leave special tokens, such as </s>, out of the output.")
@click.option("--freeze", is_flag=True, help="Read without learning: the memory stays as it is.")
@click.option(
    "--guard",
    type=click.Choice(GUARDS),
    default="bundle",
    help="What to do when the memory exceeds the bundle's limits.  bundle: what the bundle says.",
)
@restart_option
@engine_option
@session_options
@json_option
def run(**values: Any) -> None:
    """Read a text, continue a prompt, or both.

    The model learns while it reads and generates, unless --freeze is given. --text streams a file of any length in
    constant memory and reports how well it was predicted, in bits per byte. The continuation of --prompt appears on
    stdout token by token. A note on stderr warns when the memory diverges or the guard acts. With --state the model
    remembers earlier runs; a run that fails or is interrupted leaves the file as it was.
    """
    _run(RunOptions(**values))


def _run(options: RunOptions) -> None:
    if "" in options.stop:
        raise UsageError("E0104", "run", "--stop is empty", "give a text or leave it out")
    if options.key_file is not None and options.state is None:
        raise UsageError("E0103", "run", "--key-file needs --state", "name the state file")
    prompt = None if options.prompt is None else os.fsencode(options.prompt)
    if prompt is None and options.text is None:
        prompt = _stdin_prompt()

    key = _check_state(options)
    session = open_session(options.bundle, options)
    if session.input_kind == "vectors":
        raise UsageError("E0106", "run", f"{options.bundle} takes vectors, not text", "use Stream.feed in Python")
    from ..tokenizer import open_tokenizer

    tokenizer = open_tokenizer(session.info["tokenizer"], options.bundle, session.vocab_size, options.encoding_errors)
    stream = session.stream() if options.state is None else _restored(session, options.state, key)
    started, learns = stream.position, stream.learning
    if options.freeze:
        stream.freeze()
    policy: Any = session.info["guard"]["policy"]
    if options.restart_every:
        policy = "restart" if policy == "off" else policy
        stream.guard(policy, restart_every=options.restart_every)
    watch = Watch(stream, policy, options.bundle)
    result: dict[str, Any] = {
        "bundle": str(options.bundle),
        "device": session.info["device"],
        "engine": session.info["engine"],
        "engine_reason": session.info["engine_reason"],
        "backend": session.info["backend"],
        "memory_kernel": session.info["memory_kernel"],
        "learning": stream.learning,
        "position_at_start": started,
        "state_bytes_at_start": stream.state_bytes,
    }
    if options.text is not None:
        result |= _read_text(stream, tokenizer, options.text, watch)
    if prompt is not None:
        result |= _continue(stream, tokenizer, prompt, options)
    watch.look()
    result |= watch.result()
    if options.state is not None:
        if learns and options.freeze:
            stream.resume()
        stream.save(options.state, key)
        note(f"the stream is in {options.state}, at position {stream.position:,}")
        result["state"] = str(options.state)
    result |= {"position": stream.position, "state_bytes": stream.state_bytes, "peak_rss_bytes": peak_rss_bytes()}
    if options.as_json:
        emit(result)
    elif options.text is not None:
        _report(result, err=prompt is not None)


def _check_state(options: RunOptions) -> bytes | None:
    """The key of the state file, None without one. The file may be written, and holds a state if it exists."""
    if options.state is None:
        return None
    check_state(options.state)
    check_file(options.state)
    if options.key_file is None:
        return None
    from ..states import read_key

    return read_key(options.key_file)


def _restored(session: titans_runtime.Session, path: Path, key: bytes | None) -> titans_runtime.Stream:
    """The stream in the file, or a fresh one if there is none."""
    if not path.exists():
        return session.stream()
    stream = session.restore(path, key)
    note(f"continuing the stream in {path} from position {stream.position:,}")
    return stream


def _stdin_prompt() -> bytes:
    prompt = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    if not prompt:
        raise UsageError("E0103", "run", "no prompt and no text", "give --prompt, --text or a prompt on stdin")
    return prompt


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file and its size, None if unknown."""
    from ..tokenizer import open_text

    with open_text(path) as file:
        regular = str(path) != "-" and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        yield file, os.fstat(file.fileno()).st_size if regular else None


class Watch:
    """Notes on stderr when the stream's memory diverges or its guard acts, once for each kind of event."""

    def __init__(self, stream: titans_runtime.Stream, policy: str, bundle: Path) -> None:
        self._stream, self._policy, self._bundle = stream, policy, bundle
        self._warned = self._told = False

    def look(self) -> None:
        """Reads the stream's health and the guard's report."""
        health, report = self._stream.health, self._stream.guard_report
        if health.divergences and not self._warned:
            self._warned = True
            note(
                f"warning: the memory diverges at position {health.position:,}: the norm of {health.field}, head "
                f"{health.head}, is {health.value:.4g}, above {health.limit:.4g}; what it has learned may be lost. "
                f"See titans-export guard {self._bundle} --data FILE"
            )
        if report.rollbacks and not self._told:
            self._told = True
            note(f"the guard acted at position {report.position:,}: {describe(report)}; {ACTIONS[self._policy]}")

    def result(self) -> dict[str, Any]:
        """The last health and the guard's report, as `--json` prints them."""
        return {
            "learning_at_end": self._stream.learning,
            "health": dataclasses.asdict(self._stream.health),
            "guard": {"policy": self._policy, **dataclasses.asdict(self._stream.guard_report)},
        }


def describe(report: titans_runtime.GuardReport) -> str:
    """Why the guard acted last."""
    if report.field is not None:
        return f"the norm of {report.field}, head {report.head}, is {report.value:.4g}, above {report.limit:.4g}"
    return f"{report.reason}, layer {report.layer}, head {report.head}"


def _read_text(stream: titans_runtime.Stream, tokenizer: Tokenizer, path: Path, watch: Watch) -> dict[str, Any]:
    """Streams the file and sums up the bits of its tokens."""
    tokens = bytes_read = 0
    nats = busy = 0.0
    if tokenizer.whole_text_reason:
        note(f"the tokenizer has no safe cuts, so the whole text is held in memory: {tokenizer.whole_text_reason}")
    with _open_text(path) as (file, total), progress_bar("reading", total, "B") as advance:
        for block, covered in tokenizer.read(file):
            started = time.perf_counter()
            nats -= math.fsum(stream.score(block))
            busy += time.perf_counter() - started
            watch.look()
            tokens += len(block)
            bytes_read += covered
            advance(covered)
    return {
        "text": str(path),
        "bytes": bytes_read,
        "tokens": tokens,
        "bits_per_byte": nats / math.log(2) / bytes_read if bytes_read else None,
        "seconds": busy,
        "tokens_per_second": tokens / busy if tokens else None,
    }


def _continue(
    stream: titans_runtime.Stream, tokenizer: Tokenizer, prompt: bytes, options: RunOptions
) -> dict[str, Any]:
    """Feeds the prompt and generates. Text goes to stdout as it comes, unless there will be JSON."""
    quiet = options.as_json
    tokens = tokenizer.encode(prompt)
    if not len(tokens) and not stream.position:
        raise UsageError("E0107", "run", "empty prompt", "give at least one token to start from")
    stream.feed(tokens, outputs="none")
    decode = tokenizer.decoder(options.hide_special_tokens)
    writer, count, started = _Writer(options.stop, quiet), 0, time.perf_counter()
    if options.max_tokens:
        for token in stream.generate(**dataclasses.asdict(options.sampling())):
            count += 1
            writer.write(decode(token))
            if writer.stopped:
                break
    if not writer.stopped:
        writer.write(decode(None))
    seconds = time.perf_counter() - started
    writer.end()
    rate = count / seconds if count else None
    if not quiet and rate is not None and sys.stderr.isatty():
        note(f"{count} tokens, {rate:.0f} tokens/s")
    return {
        "prompt_tokens": len(tokens),
        "generated": writer.text,
        "generated_tokens": count,
        "generated_tokens_per_second": rate,
        "stopped": writer.stopped,
    }


class _Writer:
    """Collects generated text up to the end of a stop text, and writes it to stdout unless `quiet`."""

    def __init__(self, stop: tuple[str, ...], quiet: bool) -> None:
        self.text, self.stopped = "", False
        self._stop = stop
        self._out = None if quiet else sys.stdout.buffer

    def write(self, piece: str) -> None:
        before = len(self.text)
        self.text += piece
        ends = [end for end in (_end_of(self.text, stop, before) for stop in self._stop) if end is not None]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        if self._out and len(self.text) > before:
            self._out.write(self._visible(self.text[before:]).encode("utf-8", "replace"))
            self._out.flush()

    def _visible(self, piece: str) -> str:
        """What a terminal gets must not command it; a file or a pipe gets the text as it is."""
        return shown(piece, keep="\n\t") if self._out and self._out.isatty() else piece

    def end(self) -> None:
        if self._out and self._out.isatty():
            self._out.write(b"\n")
            self._out.flush()


def _end_of(written: str, stop: str, before: int) -> int | None:
    """The end of the first `stop` that reaches beyond `before`, None if there is none."""
    found = written.find(stop, max(0, before - len(stop) + 1))
    return None if found < 0 else found + len(stop)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    Read from /proc on Linux, because getrusage includes the parent's memory at the fork.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _report(result: dict[str, Any], err: bool) -> None:
    """Prints the numbers of a text, on stderr if stdout holds generated text."""
    bits, rate = result["bits_per_byte"], result["tokens_per_second"]
    lines = [
        ("tokens", f"{result['tokens']:,}"),
        ("bits per byte", "-" if bits is None else f"{bits:.4f}"),
        ("tokens per second", "-" if rate is None else f"{rate:,.0f}"),
        ("state", f"{size(result['state_bytes'])} ({size(result['state_bytes_at_start'])} at the start)"),
        ("peak memory", size(result["peak_rss_bytes"])),
    ]
    guard, health = result["guard"], result["health"]
    if guard["rollbacks"] or guard["repairs"]:
        acted = f"{guard['rollbacks']:,} chunks rolled back, memory set back {guard['repairs']:,} times"
        stopped = "" if result["learning_at_end"] or not result["learning"] else ", no longer learning"
        lines.append(("guard", f"{guard['policy']}: {acted}{stopped}"))
    if health["divergences"]:
        lines.append(("health", f"{health['state']}, diverged {health['divergences']:,} times"))
    for name, value in lines:
        say(f"{name + ':':<19}{value}", err=err)
