"""Text of requests and replies: chat messages, and texts that end a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_NAMES = {"user": "User", "assistant": "Assistant", "system": "System", "developer": "System", "tool": "Tool"}


def chat_prompt(messages: Sequence[Mapping[str, str]], form: str, fresh: bool) -> str:
    """The text that a model without a chat template reads. fresh: the stream has read nothing yet."""
    if form == "plain":
        return "\n".join(message["content"] for message in messages)
    lines = [f"{_NAMES[message['role']]}: {message['content']}" for message in messages]
    return ("" if fresh else "\n") + "\n".join([*lines, "Assistant:"])


def chat_stops(form: str) -> tuple[str, ...]:
    """Texts at which an answer ends."""
    return ("\nUser:",) if form == "roles" else ()


class StopText:
    """Generated text up to the first stop text. Text that may begin a stop text is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that is certain with this piece."""
        if self.stopped:
            return ""
        self._held += piece
        ends = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.stopped = True
            return self._take(min(ends))
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:size]):
                    keep = size
                    break
        return self._take(len(self._held) - keep)

    def rest(self) -> str:
        """The text held back, when nothing follows."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
