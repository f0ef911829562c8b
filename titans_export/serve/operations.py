"""What a call does with a stream: feed, generate and score, as steps of the batcher."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..text.base import Tokenizer
from .batcher import Read
from .errors import ServeError
from .sampling import Floats, Sampling, log_probabilities, sample
from .text import StopText

Part = dict[str, Any]
Emit = Callable[[str], None]


@dataclass
class Work:
    """A stream while a call runs. `parts` collects what it has read, in the cuts in which it was read."""

    position: int
    last: Floats | None  # the outputs after its last token, None at position 0
    block: int
    vocab_size: int
    parts: list[Part] = field(default_factory=list)

    def read(self, tokens: Any, outputs: Literal["last", "all"] = "last") -> Generator[Read, Any, list[Floats]]:
        """Reads tokens or vectors in blocks. Returns the outputs of each block if `outputs` is "all"."""
        rows: list[Floats] = []
        if len(tokens):
            self.parts.append(to_part(tokens, self.block))
        for start in range(0, len(tokens), self.block):
            piece = tokens[start : start + self.block]
            found = yield Read(piece, outputs)
            self.last = np.array(found[-1] if outputs == "all" else found)
            if outputs == "all":
                rows.append(found)
        self.position += len(tokens)
        return rows


@dataclass(frozen=True)
class Feed:
    """Reads tokens or vectors. With `score`, the answer has the surprise of the tokens.

    tokenizer: makes the answer have the text of each token too.
    """

    tokens: Any
    score: bool = False
    tokenizer: Tokenizer | None = None

    def steps(self, work: Work) -> Generator[Read, Any, dict[str, Any]]:
        """The answer has the number of tokens, and the nats of all if they were asked for."""
        if not self.score:
            yield from work.read(self.tokens)
            return {"tokens": len(self.tokens)}
        logprobs = yield from _score(work, self.tokens)
        nats = -float(np.sum(logprobs)) if logprobs else 0.0
        # JSON has no infinity, the surprise of a token that the model excludes.
        finite = [one if math.isfinite(one) else None for one in logprobs]
        answer = {"tokens": len(self.tokens), "nats": nats if math.isfinite(nats) else None, "logprobs": finite}
        return {**answer, "pieces": _pieces(self.tokenizer, self.tokens)} if self.tokenizer else answer


@dataclass(frozen=True)
class Generate:
    """Reads a prompt and continues it. Each token is read by the stream before it is shown."""

    prompt: Any
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    tokenizer: Tokenizer | None
    emit: Emit | None = None

    def steps(self, work: Work) -> Generator[Read, Any, dict[str, Any]]:
        """The answer has text, tokens and the reason of the end."""
        yield from work.read(self.prompt)
        if self.max_tokens and work.last is None:
            raise ServeError(400, "E0107", "request", "empty prompt", "give at least one token to start from")
        decode = self.tokenizer.decoder(skip_special_tokens=True) if self.tokenizer else None
        writer, reason = StopText(self.stop), "length"
        text: list[str] = []
        tokens: list[int] = []
        generated: list[int] = []
        if self.max_tokens:
            work.parts.append({"tokens": generated, "block": 1})
        while len(tokens) < self.max_tokens:
            assert work.last is not None
            token = sample(work.last, self.sampling, len(tokens))
            work.last = np.array((yield Read(np.array([token], np.int32))))
            generated.append(token)
            tokens.append(token)
            work.position += 1
            if decode:
                self._show(text, writer.add(decode(token)))
            if writer.stopped:
                reason = "stop"
                break
        if decode and not writer.stopped:
            self._show(text, writer.add(decode(None)))
            self._show(text, writer.rest())
        return {
            "text": "".join(text),
            "tokens": tokens,
            "finish_reason": "stop" if writer.stopped else reason,
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": len(tokens),
                "total_tokens": len(self.prompt) + len(tokens),
            },
            "seed": self.sampling.seed,
        }

    def _show(self, text: list[str], piece: str) -> None:
        if piece:
            text.append(piece)
            if self.emit:
                self.emit(piece)


def _score(work: Work, tokens: npt.NDArray[np.int32]) -> Generator[Read, Any, list[float]]:
    """ln p of each token given all before it; at position 0 the first is uniform, as in the runtime."""
    before = work.last if work.last is not None else np.zeros(work.vocab_size, np.float32)
    scored: list[float] = []
    if len(tokens):
        work.parts.append(to_part(tokens, work.block))
    for start in range(0, len(tokens), work.block):
        piece = tokens[start : start + work.block]
        rows = yield Read(piece, "all")
        scored += log_probabilities(np.concatenate([before[None], rows[:-1]]), piece)
        work.last = before = np.array(rows[-1])
    work.position += len(tokens)
    return scored


def _pieces(tokenizer: Tokenizer, tokens: npt.NDArray[np.int32]) -> list[str]:
    """The text that is complete with each token. Together they are the text of all tokens."""
    decode = tokenizer.decoder()
    pieces = [decode(int(token)) for token in tokens]
    if pieces:
        pieces[-1] += decode(None)
    return pieces


def to_part(tokens: Any, block: int) -> Part:
    """Tokens or vectors as a record has them. A replay feeds the same blocks, so it gives the same bits."""
    if tokens.dtype == np.float32:
        encoded = base64.b64encode(np.ascontiguousarray(tokens).tobytes()).decode()
        return {"vectors": encoded, "size": tokens.shape[1], "block": block}
    return {"tokens": tokens.tolist(), "block": block}


def from_part(part: Part) -> Any:
    """The tokens or vectors of a part."""
    if "vectors" in part:
        return np.frombuffer(base64.b64decode(part["vectors"]), np.float32).reshape(-1, part["size"])
    return np.asarray(part["tokens"], np.int32)


def part_size(part: Part) -> int:
    """The number of tokens or vectors."""
    return len(part["tokens"]) if "tokens" in part else len(from_part(part))
