"""`titans-export run`: text through a bundle, and on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..errors import UsageError
from .command import Command, emit, json_option, note
from .options import PATH, bundle_argument, engine_option, open_session, session_options
from .progress import progress_bar
from .table import size

if TYPE_CHECKING:
    import titans_runtime

    from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as `titans_runtime.Stream.generate` takes it."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@click.command(
    cls=Command,
    examples=(
        'titans-export run mac.titans --prompt "To be, or not" --temperature 0.8',
        "titans-export run mac.titans --text book.txt --json",
        'titans-export run mac.titans --text book.txt --prompt "The end of it was" --stop "."',
        "echo -n Once | titans-export run mac.titans --seed 7",
    ),
)
@bundle_argument
@click.option("--prompt", help="Text to continue.  [default: stdin, where it is no terminal and --text is not given]")
@click.option("--text", type=PATH, help="File to read, - for stdin; with --prompt the model learns from it first.")
@click.option("--max-tokens", type=click.IntRange(0), default=256, help="Tokens to write at most.")
@click.option("--temperature", type=click.FloatRange(0), default=1.0, help="0 takes the most likely token each time.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Choose among the k most likely; 0: among all.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Choose among the likeliest that make up p.",
)
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="Leave out what is below p times the best.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Same seed, same tokens.")
@click.option("--stop", multiple=True, help="End after this text has been written; may be given again.")
@click.option("--freeze", is_flag=True, help="Keep the memory as it is: read, but do not learn.")
@engine_option
@session_options
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    text: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    stop: tuple[str, ...],
    freeze: bool,
    engine: str | None,
    device: str,
    backend: str | None,
    threads: int,
    memory_kernel: str,
    as_json: bool,
) -> None:
    """Read a text, continue a prompt, or both.

    The model learns all the while, unless --freeze is given. --text streams a file of any length at constant memory and
    reports how well it was predicted, in bits per byte. --prompt is continued on stdout, token by token.
    """
    if "" in stop:
        raise UsageError("run", "--stop with some text", "an empty one", "leave it out")
    start = None if prompt is None else os.fsencode(prompt)
    if start is None and text is None:
        start = _stdin_prompt()

    session = open_session(bundle, device, backend, threads, memory_kernel, engine)
    if session.input_kind == "vectors":
        raise UsageError(
            "run",
            "a bundle that takes tokens",
            f"{bundle}, which takes vectors",
            "feed it from Python with Stream.feed",
        )
    from ..tokenizer import open_tokenizer

    tokenizer = open_tokenizer(session.info["tokenizer"], bundle)
    stream = session.stream()
    if freeze:
        stream.freeze()
    result: dict[str, Any] = {
        "bundle": str(bundle),
        "device": session.info["device"],
        "engine": session.info["engine"],
        "engine_reason": session.info["engine_reason"],
        "backend": session.info["backend"],
        "memory_kernel": session.info["memory_kernel"],
        "learning": not freeze,
        "state_bytes_at_start": stream.state_bytes,
    }
    if text is not None:
        result |= _read_text(stream, tokenizer, text)
    if start is not None:
        sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, seed)
        result |= _continue(stream, tokenizer, start, sampling, stop, quiet=as_json)
    result |= {"position": stream.position, "state_bytes": stream.state_bytes, "peak_rss_bytes": peak_rss_bytes()}
    if as_json:
        emit(result)
    elif text is not None:
        _report(result, err=start is not None)


def _stdin_prompt() -> bytes:
    prompt = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    if not prompt:
        raise UsageError("run", "a --prompt, a --text or a text on stdin", "none", "give one of them")
    return prompt


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file and its size, None where it has none."""
    if str(path) == "-":
        yield sys.stdin.buffer, None
        return
    with path.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size or None


def _read_text(stream: titans_runtime.Stream, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Streams the file and sums up how well each token was predicted."""
    tokens = bytes_read = 0
    nats = busy = 0.0
    with _open_text(path) as (file, total), progress_bar("reading", total, "B") as advance:
        for block, covered in tokenizer.read(file):
            started = time.perf_counter()
            nats -= math.fsum(stream.score(block))
            busy += time.perf_counter() - started
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
    stream: titans_runtime.Stream,
    tokenizer: Tokenizer,
    prompt: bytes,
    sampling: Sampling,
    stop: tuple[str, ...],
    quiet: bool,
) -> dict[str, Any]:
    """Feeds the prompt and writes what follows, as it comes unless `quiet`."""
    tokens = tokenizer.encode(prompt)
    if not len(tokens) and not stream.position:
        raise UsageError("run", "a prompt of at least one token", "an empty one", "give some text to start from")
    stream.feed(tokens, logits="none")
    decode = tokenizer.decoder()
    writer, count, started = _Writer(stop, quiet), 0, time.perf_counter()
    if sampling.max_tokens:
        for token in stream.generate(**dataclasses.asdict(sampling)):
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
    """Text that comes piece by piece, onto stdout unless `quiet`, up to where one of the stop texts ends."""

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
            self._out.write(self.text[before:].encode("utf-8", "replace"))
            self._out.flush()

    def end(self) -> None:
        if self._out and self._out.isatty():
            self._out.write(b"\n")
            self._out.flush()


def _end_of(written: str, stop: str, before: int) -> int | None:
    """Where the first `stop` ends that reaches beyond `before`, None if there is none."""
    found = written.find(stop, max(0, before - len(stop) + 1))
    return None if found < 0 else found + len(stop)


def peak_rss_bytes() -> int:
    """The most memory this process has had resident.

    From Linux's own account of it: getrusage counts in what the parent had when it forked.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _report(result: dict[str, Any], err: bool) -> None:
    """The numbers of a text for people; on stderr where stdout holds what the model wrote."""
    bits, rate = result["bits_per_byte"], result["tokens_per_second"]
    lines = (
        ("tokens", f"{result['tokens']:,}"),
        ("bits per byte", "-" if bits is None else f"{bits:.4f}"),
        ("tokens per second", "-" if rate is None else f"{rate:,.0f}"),
        ("state", f"{size(result['state_bytes'])} (at the start {size(result['state_bytes_at_start'])})"),
        ("peak memory", size(result["peak_rss_bytes"])),
    )
    for name, value in lines:
        click.echo(f"{name + ':':<19}{value}", err=err)
