"""A chat that remembers: what is said changes the model's memory, and a file keeps that memory between runs.

    python examples/chat.py mac.titans
    python examples/chat.py mac.titans --state ann.tstate --key-file ann.key

The model goes on as it was trained to: one that was trained on a novel writes on as novels do. Commands:

    /save      write the memory to its file now; it is written on exit as well
    /rewind    take back what was said last, as if it had never been said
    /fork      try something on a copy of the memory; /back drops the copy and goes on before it
    /forget    a fresh memory, and the file is deleted
    /memory    how large it is, and how far it has read
    /quit      save and end, as Ctrl-D does; Ctrl-C ends an answer
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

TURNS = 8  # that can be taken back; each costs one copy of the state
ANSWER = 300  # tokens of an answer at most
COMMANDS = ("/save", "/rewind", "/fork", "/back", "/forget", "/memory", "/quit")


class Chat:
    """One person's memory, in the file `state`."""

    def __init__(self, bundle: Path, state: Path, key: bytes | None) -> None:
        self.session = rt.Session(bundle)
        self.tokenizer = open_tokenizer(self.session.info["tokenizer"], bundle)
        self.state, self.key = state, key
        self.stream = self.session.restore(state, key=key) if state.exists() else self.session.stream()
        self.before_forks: list[rt.Stream] = []

    def answer(self, text: str) -> Iterator[str]:
        """Says something to the model, and yields its answer piece by piece: a line, or ANSWER tokens."""
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
        """Does what the command says and returns what to tell."""
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
        """Replaces the file. Whatever happens on the way, the old one or the new one is there, whole."""
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
    """Line by line, until the input ends or someone says /quit."""
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
    parser = argparse.ArgumentParser(description="A chat that remembers.", epilog=" ".join(COMMANDS))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--state", type=Path, default=Path("chat.tstate"), help="file of the memory (chat.tstate)")
    parser.add_argument("--key-file", type=Path, help="32 bytes; the memory's file is encrypted with them")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))  # sys.exit passes through `finally`
    try:
        key = options.key_file.read_bytes() if options.key_file else None
        chat = Chat(options.bundle, options.state, key)
        print(f"position {chat.stream.position}" if chat.stream.position else "a fresh memory")
        try:
            talk(chat)
        finally:
            if chat.stream.position:  # nothing to keep after /forget
                chat.save()
                print(f"saved in {chat.state}")
    except (rt.Error, TitansError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
