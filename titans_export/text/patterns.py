"""Regular expressions of tokenizer files: which two neighbouring characters no match can hold.

A pattern becomes a position automaton (Glushkov): one position for each character that it may read, and the pairs of
positions that may follow each other. It ignores lookaheads and possessive quantifiers, which only remove matches.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

Test = Callable[[str], bool]
_NONE: frozenset[int] = frozenset()
_CATEGORIES = frozenset("LMNPSZC")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_LOOKAHEADS = ("(?=", "(?!")


class Unsupported(Exception):
    """A part of a tokenizer file for which no safe cut is known. The text is the reason."""


class Single(NamedTuple):
    """A position that can be a whole match, unless a possessive part takes its character first."""

    position: int
    rivals: frozenset[int]


@dataclass(frozen=True)
class Part:
    """A part of a pattern: positions that can come first and last, and pairs that can follow each other.

    nullable: it can match nothing. optional: it can match nothing without a lookahead.
    """

    nullable: bool = True
    optional: bool = True
    first: frozenset[int] = _NONE
    last: frozenset[int] = _NONE
    pairs: frozenset[tuple[int, int]] = frozenset()
    single: frozenset[Single] = frozenset()
    possessive: frozenset[int] = _NONE


class Pattern:
    """A regular expression in Oniguruma's syntax. Raises Unsupported if it is not understood."""

    def __init__(self, source: str) -> None:
        self._tests: list[Test] = []
        self._lookaheads: list[Test] = []
        self._source, self._at, self._ignore_case = source, 0, False
        whole = self._alternatives()
        if self._at < len(source):
            raise self._unsupported("an unbalanced parenthesis")
        if whole.nullable:
            raise self._unsupported("an empty match")
        self._whole = whole

    def crosses(self, left: str, right: str) -> bool:
        """Whether a match may hold `left` followed by `right`."""
        return any(self._tests[i](left) and self._tests[j](right) for i, j in self._whole.pairs)

    def reads(self, char: str) -> bool:
        """Whether a match may hold the character."""
        return any(test(char) for test in self._tests)

    def always_matches(self, char: str) -> bool:
        """Whether a match begins at each occurrence of the character that no earlier match has reached."""
        tests = self._tests
        return any(
            tests[one.position](char) and not any(tests[rival](char) for rival in one.rivals)
            for one in self._whole.single
        )

    def looks_at(self, char: str) -> bool:
        """Whether a lookahead treats the character differently from the end of the text."""
        return any(test(char) for test in self._lookaheads)

    # The parser.

    def _unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"the pattern {self._source!r} has {what}")

    def _peek(self, text: str) -> bool:
        return self._source.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        found = self._peek(text)
        self._at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self._at >= len(self._source):
            raise self._unsupported("no end")
        self._at += 1
        return self._source[self._at - 1]

    def _alternatives(self) -> Part:
        found = self._sequence()
        while self._take("|"):
            other = self._sequence()
            found = Part(
                found.nullable or other.nullable,
                found.optional or other.optional,
                found.first | other.first,
                found.last | other.last,
                found.pairs | other.pairs,
                found.single | other.single,
                found.possessive | other.possessive,
            )
        return found

    def _sequence(self) -> Part:
        found = Part()
        while self._at < len(self._source) and not self._peek("|") and not self._peek(")"):
            part = self._repeated(self._atom())
            single = {Single(one.position, one.rivals | part.possessive) for one in found.single if part.optional}
            single |= {Single(one.position, one.rivals | found.possessive) for one in part.single if found.optional}
            found = Part(
                found.nullable and part.nullable,
                found.optional and part.optional,
                found.first | part.first if found.nullable else found.first,
                found.last | part.last if part.nullable else part.last,
                found.pairs | part.pairs | frozenset(product(found.last, part.first)),
                frozenset(single),
                found.possessive | part.possessive,
            )
        return found

    def _repeated(self, part: Part) -> Part:
        while (bounds := self._bounds()) is not None:
            least, most = bounds
            possessive = self._take("+")
            if not possessive:
                self._take("?")
            if most == 0:
                raise self._unsupported("a part that is repeated 0 times")
            again = frozenset(product(part.last, part.first)) if most is None or most > 1 else frozenset()
            part = Part(
                part.nullable or least == 0,
                part.optional or least == 0,
                part.first,
                part.last,
                part.pairs | again,
                part.single if least < 2 else frozenset(),
                part.possessive | (self._positions(part) if possessive else _NONE),
            )
        return part

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("?", (0, 1)), ("*", (0, None)), ("+", (1, None))):
            if self._take(sign):
                return bounds
        if not self._peek("{"):
            return None
        end = self._source.find("}", self._at)
        least, comma, most = self._source[self._at + 1 : end].partition(",")
        if end < 0 or not least.isdecimal() or (most and not most.isdecimal()):
            raise self._unsupported("an unknown use of {")
        self._at = end + 1
        if self._peek("+") or (self._peek("?") and not comma):  # Oniguruma reads {2}? as (?:{2})?, and {1,3}+ alike
            raise self._unsupported("a repetition of {}")
        return int(least), int(most) if most else None if comma else int(least)

    @staticmethod
    def _positions(part: Part) -> frozenset[int]:
        return part.first | part.last | {position for pair in part.pairs for position in pair}

    def _atom(self) -> Part:
        if self._peek("("):
            return self._group()
        if self._take("["):
            return self._position(self._class())
        if self._take("."):
            return self._position(lambda char: char != "\n")
        if self._peek("^") or self._peek("$"):
            raise self._unsupported("an anchor")
        if self._take("\\"):
            return self._position(self._escape())
        return self._position(self._literal(self._next()))

    def _group(self) -> Part:
        ignore_case = self._ignore_case
        ahead = next((sign for sign in _LOOKAHEADS if self._take(sign)), None)
        if ahead is None and not (self._take("(?:") or self._take("(?>")):
            if self._take("(?i:"):
                self._ignore_case = True
            elif self._peek("(?"):
                raise self._unsupported(f"the group {self._source[self._at : self._at + 4]!r}")
            else:
                self._next()
        first = len(self._tests)
        part = self._alternatives()
        if not self._take(")"):
            raise self._unsupported("an unbalanced parenthesis")
        self._ignore_case = ignore_case
        if ahead is None:
            return part
        if part.nullable or part.pairs:
            raise self._unsupported("a lookahead over more than one character")
        self._lookaheads += self._tests[first:]
        del self._tests[first:]  # it reads a character but does not take it
        return Part(nullable=True, optional=False)

    def _position(self, test: Test) -> Part:
        position = len(self._tests)
        if self._ignore_case:
            exact = test

            def test(char: str) -> bool:
                return exact(char) or exact(char.lower()) or exact(char.upper())

        self._tests.append(test)
        one = frozenset((position,))
        # Oniguruma's rules of case are wider than ours, so a match is possible but not certain.
        single = frozenset() if self._ignore_case else frozenset((Single(position, _NONE),))
        return Part(False, False, one, one, frozenset(), single)

    def _literal(self, char: str) -> Test:
        if self._ignore_case and not char.isascii():
            raise self._unsupported("a character of its own case rules")
        return lambda given: given == char

    def _escape(self) -> Test:
        kind = self._next()
        if kind in "pP":
            return self._property(kind == "P")
        if kind in "sSdDwW":
            test = {"s": str.isspace, "d": _is_digit, "w": is_word}[kind.lower()]
            return test if kind.islower() else lambda char: not test(char)
        return self._literal(self._character(kind))

    def _character(self, kind: str) -> str:
        """The character of an escape."""
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        if kind in "ux":
            digits = self._source[self._at : self._at + (4 if kind == "u" else 2)]
            if not all(digit in "0123456789abcdefABCDEF" for digit in digits) or len(digits) < 2:
                raise self._unsupported(f"the escape \\{kind}")
            self._at += len(digits)
            return chr(int(digits, 16))
        if kind.isalnum():
            raise self._unsupported(f"the escape \\{kind}")
        return kind

    def _property(self, negated: bool) -> Test:
        end = self._source.find("}", self._at)
        if not self._take("{") or end < 0:
            raise self._unsupported("an unknown property")
        name = self._source[self._at : end]
        self._at = end + 1
        if name.startswith("^"):
            name, negated = name[1:], not negated
        if name == "Han":
            return lambda char: ("\u4e00" <= char <= "\u9fa5") != negated
        if name[:1] not in _CATEGORIES or len(name) > 2:
            raise self._unsupported(f"the property {name!r}")
        return lambda char: unicodedata.category(char).startswith(name) != negated

    def _class(self) -> Test:
        """A class, after its opening bracket."""
        negated = self._take("^")
        groups: list[list[Test]] = [[]]
        if self._peek("]") or self._peek("-"):
            raise self._unsupported("a class that begins with ] or -")
        while not self._take("]"):
            if self._peek("[:"):
                raise self._unsupported("a POSIX class")
            if self._take("&&"):
                groups.append([])
            elif self._take("["):
                groups[-1].append(self._class())
            else:
                groups[-1].append(self._class_item())
        return lambda char: all(any(test(char) for test in tests) for tests in groups) != negated

    def _class_item(self) -> Test:
        char = self._next()
        if char == "\\":
            kind = self._source[self._at : self._at + 1]
            if kind and kind in "pPsSdDwW":
                return self._escape()
            char = self._character(self._next())
        if not self._peek("-") or self._peek("-]") or self._peek("-["):
            return self._literal(char)
        self._next()
        last = self._next()
        if last == "\\":
            last = self._character(self._next())
        return lambda given: char <= given <= last


def _is_digit(char: str) -> bool:
    return unicodedata.category(char) == "Nd"


def is_word(char: str) -> bool:
    """Whether the character belongs to a word."""
    category = unicodedata.category(char)
    return category[0] in "LM" or category in ("Nd", "Pc")
