"""Bodies of requests, checked before anything runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from .names import PATTERN

MAX_INT = 2**63 - 1
Token = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Float = Annotated[float, Field(allow_inf_nan=False)]
StreamName = Annotated[str, Field(pattern=PATTERN)]
Stops = str | Annotated[list[str], Field(max_length=16)] | None


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """Fields that OpenAI's clients send and that change no result are ignored."""

    model_config = ConfigDict(extra="allow")


class Create(Strict):
    """A new stream. Without a name it gets a random one."""

    name: StreamName | None = None
    learning: bool = True


class Input(Strict):
    """Text, tokens or vectors: one of them, of the kind that the bundle takes."""

    text: str | None = None
    tokens: list[Token] | None = None
    vectors: list[list[Float]] | None = None


class FeedBody(Input):
    """What the stream reads."""


class ScoreBody(Input):
    """What the stream reads, and whether the answer has the text of each token."""

    pieces: bool | None = None


class Draws(Strict):
    """How tokens are drawn."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] = 64
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    stop: Stops = None


class GenerateBody(Draws):
    """What the stream reads, and how it continues."""

    text: str | None = None
    tokens: list[Token] | None = None
    stream: bool = False


class PositionBody(Strict):
    """A mark's position."""

    position: Annotated[int, Field(strict=True, ge=0, le=MAX_INT)]


class ForkBody(Strict):
    """The name of the new stream; random without one."""

    name: StreamName | None = None


class StreamOptions(Lenient):
    """OpenAI's options of a streamed reply."""

    include_usage: bool = False


class OpenAiDraws(Lenient):
    """OpenAI's options of a generation. Those that would change the result and are not supported are refused."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_INT)] | None = None
    stop: Stops = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    fork: Annotated[StreamName | None, Field(description="A named stream to start from; it stays unchanged.")] = None


class CompletionBody(OpenAiDraws):
    """A prompt to continue."""

    prompt: str | list[Token] | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None


class ContentPart(Lenient):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Lenient):
    """A chat message. Only its role and text are read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]

    def plain(self) -> dict[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatBody(OpenAiDraws):
    """Messages to answer. With a named stream these are the new ones only."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None


# Fields of OpenAI's API that would change the result, with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}


class ErrorDetail(BaseModel):
    """An error in OpenAI's form, with the code of docs/errors.md."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The answer to a failed request."""

    error: ErrorDetail


Answer = dict[str, JsonValue]
