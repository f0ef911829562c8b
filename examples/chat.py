"""A chat with memory: the conversation updates the model's memory, and a file keeps that memory between runs.

    python examples/chat.py mac.titans
    python examples/chat.py mac.titans --state ann.tstate --key-file ann.key

The model continues text in the style of its training data: a model trained on novels writes like a novel. Commands:

    /save      write the memory to its file now; it is also written on exit
    /rewind    undo the last message, as if it had never been sent
    /fork      continue on a copy of the memory; /back drops the copy and returns
    /forget    start with a new memory and delete the file
    /memory    show the memory's size and the tokens read
    /quit      save and exit, like Ctrl-D; Ctrl-C stops an answer
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import titans_runtime as rt
from titans_export.errors import TitansError
from titans_export.tokenizer import open_tokenizer

TURNS = 8  # turns that can be undone; each costs one copy of the state
ANSWER = 300  # most tokens of an answer
COMMANDS = ("/save", "/rewind", "/fork", "/back", "/forget", "/memory", "/quit")


class Chat:
    """One user's memory, in the file `state`."""

    def __init__(self, bundle: Path, state: Path, key: bytes | None) -> None:
        self.session = rt.Session(bundle)
        self.tokenizer = open_tokenizer(self.session.info["tokenizer"], bundle, self.session.vocab_size)
        self.state, self.key = state, key
        self.stream = self.session.restore(state, key=key) if state.exists() else self.session.stream()
        self.before_forks: list[rt.Stream] = []

    def answer(self, text: str) -> Iterator[str]:
        """Feeds a message to the model. Yields the answer piece by piece, up to the end of a line or ANSWER tokens."""
        self._remember_turn()
        self.stream.feed(self.tokenizer.encode(f"{text}\n".encode("utf-8", "replace")), outputs="none")
        decode = self.tokenizer.decoder()
        for token in self.stream.generate(ANSWER, temperature=0.7, top_p=0.95, seed=self.stream.position):
            piece, newline, _ = decode(token).partition("\n")
            yield piece
            if newline:
                return
        yield decode(None)

    def run(self, command: str) -> str:
        """Runs a command. Returns the text to print."""
        if command == "/save":
            self.save()
            return f"saved in {self.state}"
        if command == "/rewind":
            if not self.stream.marks:
                return "nothing to take back"
            mark = self.stream.marks[-1]
            self.stream.rewind(mark)
            self.stream.unmark(mark)
            return f"back at position {mark}"
        if command == "/fork":
            self.before_forks.append(self.stream)
            self.stream = self.stream.fork()
            return "on a copy now; /back drops it"
        if command == "/back":
            if not self.before_forks:
                return "there is no fork"
            self.stream.close()
            self.stream = self.before_forks.pop()
            return f"back at position {self.stream.position}, before the fork"
        if command == "/forget":
            self.before_forks.clear()
            self.stream = self.session.stream()
            self.state.unlink(missing_ok=True)
            return "forgotten"
        if command == "/memory":
            return self._memory()
        return "commands: " + " ".join(COMMANDS)

    def save(self) -> None:
        """Replaces the file atomically: after a failure, the file holds the old or the new memory, complete."""
        self.stream.save(self.state, key=self.key)

    def _remember_turn(self) -> None:
        self.stream.mark()
        if len(self.stream.marks) > TURNS:
            self.stream.unmark(self.stream.marks[0])

    def _memory(self) -> str:
        lines = [f"{self.stream.position} tokens read, {self.stream.state_bytes} bytes of state"]
        for name, values in self.stream.memory().items():
            if name.rpartition(".")[2][0] in "WS":
                lines.append(f"  |{name}| = {np.linalg.norm(values):.3g}")
        return "\n".join(lines)


def talk(chat: Chat) -> None:
    """Reads lines until the input ends or the user enters /quit."""
    while True:
        try:
            text = input("fork> " if chat.before_forks else "you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text.startswith("/"):
            print(chat.run(text))
        elif text:
            try:
                for piece in chat.answer(text):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" ...", end="")
            print()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Chats with a model whose memory persists.", epilog=" ".join(COMMANDS))
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--state", type=Path, default=Path("chat.tstate"), help="state file with the memory (chat.tstate)"
    )
    parser.add_argument("--key-file", type=Path, help="file with 32 bytes, the key that encrypts the state file")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))  # sys.exit passes through `finally`
    try:
        key = options.key_file.read_bytes() if options.key_file else None
        chat = Chat(options.bundle, options.state, key)
        print(f"position {chat.stream.position}" if chat.stream.position else "a fresh memory")
        try:
            talk(chat)
        finally:
            if chat.stream.position:  # there is nothing to save after /forget
                chat.save()
                print(f"saved in {chat.state}")
    except (rt.Error, TitansError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
