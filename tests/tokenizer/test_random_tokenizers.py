"""Random tokenizer files: wherever a cut counts as safe, blocks give the tokens of the whole text."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install titans-export[tokenizer]")

from titans_export.text import file as file_module  # noqa: E402
from titans_export.tokenizer import FileTokenizer  # noqa: E402

Spec = dict[str, Any]
ALPHABET = "ab 1.\n"
CLASSES = (r"\s", r"\S", r"\p{L}", r"\p{N}", "[ab]", r"[^a\s]", r"[^\s\p{L}]", r"\w", r"\W", ".", "[a1.]", r"\d")
LOOKAHEADS = (r"(?!\S)", r"(?=\s)", "(?!a)", "(?=[ab])", "(?!1)")
BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
CHARACTERS = [*map(chr, range(1, 0x180)), "▁"]


def _atom(rng: random.Random) -> str:
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(("a", "b", " ", "1", r"\.", r"\n"))
    if kind < 7:
        return rng.choice(CLASSES)
    return rng.choice(("(?:", "(?:", "(?>", "(?i:", "(")) + "|".join(map(_sequence, [rng] * rng.randint(1, 2))) + ")"


def _sequence(rng: random.Random) -> str:
    text = ""
    for _ in range(rng.randint(1, 3)):
        text += _atom(rng)
        if (draw := rng.random()) < 0.45:
            text += rng.choice(("?", "*", "+", "{1,2}", "{2}", "{2,}")) + rng.choice(("", "", "", "?"))
        elif draw < 0.5:
            text += rng.choice(("?+", "*+", "++"))
        if rng.random() < 0.12:
            text += rng.choice(LOOKAHEADS)
    return text


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(ALPHABET, k=length))


def _split(rng: random.Random) -> Spec:
    regex = "|".join(map(_sequence, [rng] * rng.randint(1, 4))) + rng.choice(("", r"|\s+(?!\S)|\s+", r"|.|\n"))
    pattern = {"Regex": regex} if rng.random() < 0.85 else {"String": _text(rng, rng.randint(1, 2))}
    return {"type": "Split", "pattern": pattern, "behavior": rng.choice(BEHAVIORS), "invert": rng.random() < 0.3}


def _pre_tokenizer(rng: random.Random) -> Spec:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": rng.choice(("always", "first", "never"))}
    if rng.random() < 0.15:
        return {**metaspace, "split": False}
    parts = [_split(rng)]
    while rng.random() < 0.4:
        other = rng.choice(
            (
                _split(rng),
                {"type": "Digits", "individual_digits": rng.random() < 0.5},
                {"type": "Punctuation", "behavior": rng.choice(BEHAVIORS)},
                {**metaspace, "split": rng.random() < 0.6},
                {"type": "WhitespaceSplit"},
                {"type": "Whitespace"},
                {"type": "BertPreTokenizer"},
                {"type": "CharDelimiterSplit", "delimiter": rng.choice("a1 ")},
                {
                    "type": "ByteLevel",
                    "add_prefix_space": rng.random() < 0.5,
                    "trim_offsets": True,
                    "use_regex": rng.random() < 0.5,
                },
            )
        )
        parts.insert(rng.randrange(len(parts) + 1), other)
    return {"type": "Sequence", "pretokenizers": parts}


def _normalizer(rng: random.Random) -> Spec | None:
    if rng.random() < 0.5:
        return None
    pattern = {"Regex": _sequence(rng)} if rng.random() < 0.6 else {"String": _text(rng, rng.randint(1, 3))}
    choices = (
        {"type": "Replace", "pattern": pattern, "content": rng.choice(("", " ", "a", "▁", "b1", "1 "))},
        {"type": "Strip", "strip_left": rng.random() < 0.5, "strip_right": rng.random() < 0.5},
        {"type": "Prepend", "prepend": rng.choice("▁a")},
        {"type": "NFKC"},
    )
    return {"type": "Sequence", "normalizers": rng.choices(choices, k=rng.randint(1, 2))}


def _model(rng: random.Random) -> Spec:
    vocabulary = {char: id for id, char in enumerate(CHARACTERS)}
    if rng.random() < 0.6:  # it shows where each piece begins
        vocabulary |= {f"##{char}": len(CHARACTERS) + id for id, char in enumerate(CHARACTERS)}
        vocabulary["[UNK]"] = len(vocabulary)
        options = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 10**5}
        return {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocabulary, **options}
    known, merges = list("ab1.▁Ġ\n "), []
    for _ in range(rng.randrange(8)):
        left, right = rng.choice(known), rng.choice(known)
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append([left, right])
            known.append(left + right)
    return {"type": "BPE", "ignore_merges": rng.random() < 0.2, "vocab": vocabulary, "merges": merges}


def _added(rng: random.Random, first: int) -> list[Spec]:
    contents = {"".join(rng.choices("ab 1.<>", k=rng.randint(1, 3))) for _ in range(rng.randrange(3))}
    flags = {"single_word": 0.2, "lstrip": 0.3, "rstrip": 0.3, "normalized": 0.5, "special": 0.5}
    return [
        {"id": first + i, "content": content, **{flag: rng.random() < part for flag, part in flags.items()}}
        for i, content in enumerate(sorted(content for content in contents if content.strip()))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_random_tokenizers(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cut = tmp_path / "tokenizer.json", 0
    for number in range(60):
        rng = random.Random(1000 * seed + number)
        model = _model(rng)
        spec = {
            "version": "1.0",
            "added_tokens": _added(rng, len(model["vocab"])),
            "normalizer": _normalizer(rng),
            "pre_tokenizer": _pre_tokenizer(rng),
            "model": model,
        }
        path.write_text(json.dumps(spec), encoding="utf-8")
        theirs, mine = tokenizers.Tokenizer.from_file(str(path)), FileTokenizer(path)
        if mine.whole_text_reason:
            continue
        cut += 1
        special = [token["content"] for token in spec["added_tokens"]]
        for size in (5, 20):
            monkeypatch.setattr(file_module, "BLOCK_BYTES", size)
            text = "".join(rng.choice((*ALPHABET, *ALPHABET, "<", ">", "  ", *special)) for _ in range(200))
            blocks = [block for block, _ in mine.read(io.BytesIO(text.encode()))]
            got = [int(token) for block in blocks for token in block]
            assert got == theirs.encode(text, add_special_tokens=False).ids, (1000 * seed + number, spec)
    assert cut > 10
