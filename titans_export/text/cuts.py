"""Safe cuts: places where a text can be cut so that its parts, encoded alone, give the tokens of the whole text.

A tokenizer file normalises a text, splits it into pieces and encodes each piece. A cut between two characters is safe
if no step reads or changes text across it, and if it always ends a piece there, or no merge of the model joins the two
characters. `SafeCuts` proves this for each pair of characters from the file. What it cannot prove counts as unsafe.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from titans_runtime._decoding import Spec, byte_characters, flat

from .patterns import Pattern, Unsupported, is_word

# Characters that stand alone: normalisation neither joins them with a neighbour nor reorders them, every version of
# Unicode gives them the same properties, and case folding keeps their number. Each range holds letters of one script.
_RANGES = (
    (0x20, 0x7E),
    (0xC0, 0x24F),
    (0x391, 0x3A9),
    (0x3B1, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x621, 0x63A),
    (0x641, 0x64A),
    (0x905, 0x939),
    (0x985, 0x9B9),
    (0xA05, 0xA39),
    (0xA85, 0xAB9),
    (0xB85, 0xBB9),
    (0xC05, 0xC39),
    (0xC85, 0xCB9),
    (0xD05, 0xD39),
    (0xE01, 0xE2E),
    (0x1000, 0x1021),
    (0x1200, 0x1248),
    (0x1780, 0x17A2),
    (0x3041, 0x3093),
    (0x30A1, 0x30F3),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
)
_OTHERS = frozenset("\n\t\u060c\u061f\u0964\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u2581\u3001\u3002")
_WIDE = frozenset("\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f")
# Pairs that show whether a tokenizer has safe cuts in ordinary text.
_USUAL = (
    "a ",
    "a\n",
    "\na",
    ". ",
    "a.",
    ".a",
    "1 ",
    "} ",
    ";\n",
    "\u4e00\u3002",
    "\u3002\u4e00",
    "\u4e00\n",
    "\n\u4e00",
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@lru_cache(maxsize=1 << 16)
def stands_alone(char: str) -> bool:
    """Whether the character's properties are known and its neighbours do not change it."""
    code = ord(char)
    if not any(first <= code <= last for first, last in _RANGES):
        return char in _OTHERS or char in _WIDE
    old, folded = unicodedata.ucd_3_2_0, char.casefold()
    same = old.category(char) == unicodedata.category(char) and not unicodedata.combining(char)
    letter = char.isascii() or unicodedata.category(char)[0] == "L"
    return same and letter and len(folded) == 1 and folded.isascii() == char.isascii()


def may_precede(char: str) -> bool:
    """Whether the character leaves those after it unchanged: it stands alone, or is an accent of Latin or Greek."""
    return "\u0300" <= char <= "\u036f" or stands_alone(char)


class Sides(NamedTuple):
    """What the characters left and right of a cut have become."""

    left: str
    right: str

    def edges(self) -> str:
        """The two characters beside the cut."""
        return self.left[-1:] + self.right[:1]


class Step(NamedTuple):
    """A step of splitting: what it makes of the characters, whether it may read across, and whether it splits there.

    changes_start: whether it adds something to the start of a piece.
    """

    change: Callable[[str], str]
    crosses: Callable[[str, str], bool]
    splits: Callable[[str, str], bool]
    may_split: Callable[[str, str], bool]
    pattern: Pattern | None = None
    changes_start: bool = False


class SafeCuts:
    """The safe cuts of a parsed tokenizer file. `run_normalizer(spec, text)` runs one normaliser of it.

    Raises Unsupported if the file has a part for which none is known.
    """

    def __init__(self, spec: Spec, run_normalizer: Callable[[Spec, str], str]) -> None:
        self._run_normalizer = run_normalizer
        normalizers = list(flat(spec.get("normalizer"), "normalizers"))
        splitters = list(flat(spec.get("pre_tokenizer"), "pretokenizers"))
        self._normalizers = [_normalizer(one) for one in normalizers]
        self._steps = [step for one in splitters for step in _steps(one)]
        self._patterns = [pattern for _, pattern in self._normalizers if pattern]
        self._patterns += [step.pattern for step in self._steps if step.pattern]
        self._strips = any(one["type"] == "Strip" for one in normalizers)
        self._changes_start = any(map(_changes_start, (*normalizers, *splitters)))
        self._model = _Merges(spec["model"])
        self._added = [_Added(one, self._normalised(one)) for one in spec.get("added_tokens") or ()]
        self._whole_words = any(one.get("single_word") for one in spec.get("added_tokens") or ())
        self._known: dict[str, bool] = {}
        if not any(self.safe(pair) for pair in _USUAL):
            raise Unsupported("it does not split a text, and its model reads across every pair of characters")

    def safe(self, pair: str) -> bool:
        """Whether a cut between the two is safe, if `may_precede` holds before them and `stands_alone` after."""
        if pair not in self._known:
            self._known[pair] = all(map(stands_alone, pair)) and self._prove(pair)
        return self._known[pair]

    def _prove(self, pair: str) -> bool:
        results = {Sides(pair[0], pair[1])}
        for spec, pattern in self._normalizers:
            found = set()
            for sides in results:
                got = self._normalise(spec, pattern, sides)
                if got is None:
                    return False
                found |= got
            results = found
        edges = {sides.edges() for sides in results}
        if len(edges) > 1:  # what is read at the cut would depend on text further away
            return False
        if self._strips and any(ends[0].isspace() and ends[1].isspace() for ends in {pair, *edges}):
            return False  # a text may begin or end with these spaces
        return all(self._encodes_apart(sides) and not self._is_added(pair, sides) for sides in results)

    def _normalise(self, spec: Spec, pattern: Pattern | None, sides: Sides) -> set[Sides] | None:
        """What a normaliser can make of the two sides; None if it may read across."""
        if spec["type"] in ("Strip", "Prepend"):  # they change only the ends of a text
            return {sides}
        if pattern is None:
            given = [self._run_normalizer(spec, side) for side in sides]
            return {Sides(*given)} if all(given) else None
        if pattern.crosses(*sides.edges()):
            return None
        content: str = spec["content"]
        choices = []
        for side in sides:
            if not any(map(pattern.reads, side)):
                choices.append([side])
            elif len(literal := spec["pattern"].get("String", "")) == 1:
                choices.append([side.replace(literal, content)])
            elif len(side) == 1:
                choices.append([side, content])
            else:
                return None
        found = {Sides(left, right) for left, right in product(*choices)}
        return found if all(left and right for left, right in found) else None

    def _encodes_apart(self, sides: Sides) -> bool:
        """Whether the two sides always end in different pieces, or no merge joins them.

        Where a step may split, a later one may find the end of a piece there, or the text of the other side.
        """
        may_end = False
        for step in self._steps:
            sides = Sides(*map(step.change, sides))
            left, right = sides.left[-1], sides.right[0]
            if not (stands_alone(left) and stands_alone(right)) or step.crosses(left, right):
                return False
            if may_end and (step.changes_start or (step.pattern and step.pattern.looks_at(right))):
                return False
            if step.splits(left, right):
                return True
            may_end = may_end or step.may_split(left, right)
        return self._model.apart(*sides.edges())

    def _is_added(self, pair: str, sides: Sides) -> bool:
        """Whether an added token may reach across, or may end or begin at the cut and so change the text beside it."""
        for token in self._added:
            for ends in {pair, sides.edges()}:
                left, right = ends[0], ends[1]
                if token.reaches(left, right):
                    return True
                start_seen = self._changes_start or (self._strips and right.isspace())
                if token.may_end_with(left) and (start_seen or (self._whole_words and is_word(left))):
                    return True
                end_seen = any(pattern.looks_at(right) for pattern in self._patterns)
                end_seen = end_seen or (self._strips and left.isspace())
                if token.may_begin_with(right) and (end_seen or (self._whole_words and is_word(right))):
                    return True
        return False

    def _normalised(self, token: Spec) -> str:
        content: str = token["content"]
        for spec, _ in self._normalizers:
            content = self._run_normalizer(spec, content)
        return content


class _Added:
    """An added token, which is found before the text is split."""

    def __init__(self, token: Spec, normalised: str) -> None:
        self._texts = {token["content"], normalised} - {""}
        self._takes_left, self._takes_right = bool(token.get("lstrip")), bool(token.get("rstrip"))

    def reaches(self, left: str, right: str) -> bool:
        if any(left + right in text for text in self._texts):
            return True
        if left.isspace() and right.isspace():
            return self._takes_left or self._takes_right
        after = self._takes_right and right.isspace() and any(text.endswith(left) for text in self._texts)
        before = self._takes_left and left.isspace() and any(text.startswith(right) for text in self._texts)
        return after or before

    def may_end_with(self, char: str) -> bool:
        return any(text.endswith(char) for text in self._texts) or (self._takes_right and char.isspace())

    def may_begin_with(self, char: str) -> bool:
        return any(text.startswith(char) for text in self._texts) or (self._takes_left and char.isspace())


class _Merges:
    """The pairs of characters that merges of a model join; every pair for models without merges."""

    def __init__(self, model: Spec) -> None:
        self._vocabulary: Mapping[str, int] = {}
        if model.get("dropout"):
            raise Unsupported("its merges are random (dropout)")
        merges = model.get("merges")
        if merges is None or any(
            model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        ):
            return
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        self._vocabulary = model["vocab"]
        self._joined = {left[-1:] + right[:1] for left, right in pairs}

    def apart(self, left: str, right: str) -> bool:
        known = left in self._vocabulary and right in self._vocabulary  # others become bytes or join in one <unk>
        return known and left + right not in self._joined


def _changes_start(spec: Spec) -> bool:
    """Whether a part adds something to the start of a text."""
    kind = spec["type"]
    if kind == "Metaspace":
        return bool(spec.get("prepend_scheme", "always" if spec.get("add_prefix_space", True) else "never") != "never")
    return kind == "Prepend" or (kind == "ByteLevel" and bool(spec.get("add_prefix_space")))


_BY_CHARACTER = [
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "Nmt",
    "BertNormalizer",
    "Precompiled",
    "ByteLevel",
]


def _normalizer(spec: Spec) -> tuple[Spec, Pattern | None]:
    """A normaliser, and its pattern if it replaces text."""
    if spec["type"] == "Replace":
        return spec, _pattern(spec["pattern"])
    if spec["type"] not in ("Strip", "Prepend", *_BY_CHARACTER):
        raise Unsupported(f"unknown normalizer {spec['type']}")
    return spec, None


def _pattern(spec: Spec) -> Pattern:
    if "Regex" in spec:
        return Pattern(spec["Regex"])
    if not (text := spec["String"]):
        raise Unsupported("it splits at an empty text")
    return Pattern("".join(f"\\x{ord(char):02x}" if char.isascii() else char for char in text))


def _same(text: str) -> str:
    return text


def _never(left: str, right: str) -> bool:
    return False


def _pattern_step(pattern: Pattern, behavior: str, invert: bool = False) -> Step:
    step = _match_step(pattern.crosses, pattern.always_matches, pattern.reads, behavior)
    if invert and behavior not in ("Isolated", "Removed"):
        step = step._replace(splits=_never)
    return step._replace(pattern=pattern)


def _match_step(
    crosses: Callable[[str, str], bool], sure: Callable[[str], bool], may: Callable[[str], bool], behavior: str
) -> Step:
    """A step of matches. sure: the character always begins or is a match of its own; may: a match may hold it."""
    splits: dict[str, Callable[[str, str], bool]] = {
        "Isolated": lambda left, right: sure(left) or sure(right),
        "Removed": lambda left, right: sure(left) or sure(right),
        "MergedWithPrevious": lambda left, right: sure(left),
        "MergedWithNext": lambda left, right: sure(right),
        "Contiguous": lambda left, right: (sure(left) and not may(right)) or (sure(right) and not may(left)),
    }
    if behavior not in splits:
        raise Unsupported(f"unknown behavior {behavior}")
    return Step(_same, crosses, splits[behavior], lambda left, right: may(left) or may(right))


def _character_step(test: Callable[[str], bool], behavior: str) -> Step:
    """A step whose matches are the single characters that pass the test."""
    return _match_step(_never, test, test, behavior)


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] == "P" or char in string.punctuation


def _steps(spec: Spec) -> Iterable[Step]:
    """The steps of a pre-tokenizer."""
    kind = spec["type"]
    blank = _character_step(str.isspace, "Removed")
    if kind == "ByteLevel":
        yield Step(_same, _never, _never, _never, changes_start=_changes_start(spec))
        if spec.get("use_regex", True):
            yield _pattern_step(Pattern(_GPT2), "Isolated")
        yield Step(_to_bytes, _never, _never, _never)
    elif kind == "Metaspace":
        sign = spec["replacement"]
        yield Step(lambda text: text.replace(" ", sign), _never, _never, _never, changes_start=_changes_start(spec))
        if spec.get("split", True):
            yield _character_step(lambda char: char == sign, "MergedWithNext")
    elif kind == "Split":
        yield _pattern_step(_pattern(spec["pattern"]), spec["behavior"], spec.get("invert", False))
    elif kind == "Whitespace":
        yield _pattern_step(Pattern(r"\w+|[^\w\s]+"), "Removed", True)
    elif kind == "WhitespaceSplit":
        yield blank
    elif kind == "BertPreTokenizer":
        yield blank
        yield _character_step(_is_punctuation, "Isolated")
    elif kind == "Punctuation":
        yield _character_step(_is_punctuation, spec.get("behavior", "Isolated"))
    elif kind == "Digits":
        behavior = "Isolated" if spec.get("individual_digits") else "Contiguous"
        yield _character_step(lambda char: unicodedata.category(char)[0] == "N", behavior)
    elif kind == "CharDelimiterSplit":
        delimiter = spec["delimiter"]
        yield _character_step(lambda char: char == delimiter, "Removed")
    else:
        raise Unsupported(f"unknown pre-tokenizer {kind}")


_BYTES = byte_characters()


def _to_bytes(text: str) -> str:
    return "".join(_BYTES[byte] for byte in text.encode("utf-8", "surrogatepass"))
