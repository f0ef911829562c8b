"""Text as tokens: blocks give what the package gives for the whole text, and tokens one by one give the same text."""

# ruff: noqa: RUF001

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install titans-export[tokenizer]")

from tokenizer_files import CUT, O200K, WHOLE, gpt2, hard_text, llama2, strips  # noqa: E402

from titans_export.errors import CheckpointError  # noqa: E402
from titans_export.text import file as file_module  # noqa: E402
from titans_export.text.patterns import Pattern, Unsupported  # noqa: E402
from titans_export.text.vocabulary import check_vocabulary  # noqa: E402
from titans_export.tokenizer import ByteTokenizer, EmptyTextError, FileTokenizer, TextError, read_tokens  # noqa: E402

Make = Callable[[], "tokenizers.Tokenizer"]
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """The file of a tokenizer, trained once."""
    folder, done = tmp_path_factory.mktemp("tokenizers"), {}

    def save(make: Make) -> Path:
        if make not in done:
            done[make] = folder / f"{make.__name__}.json"
            make().save(str(done[make]))
        return done[make]

    return save


def package(path: Path) -> tokenizers.Tokenizer:
    """The package's own tokenizer, for a stream without an end."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read(tokenizer: FileTokenizer | ByteTokenizer, text: bytes) -> tuple[list[int], list[int]]:
    """The tokens of a text that is read in blocks, and the bytes of each block."""
    blocks = list(tokenizer.read(io.BytesIO(text)))
    return [int(token) for block, _ in blocks for token in block], [covered for _, covered in blocks]


@pytest.mark.parametrize("make", [*CUT, *WHOLE], ids=lambda make: make.__name__)
def test_blocks_give_the_tokens_of_the_whole_text(
    make: Make, saved: Callable[[Make], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = FileTokenizer(saved(make)), package(saved(make))
    for seed, size in enumerate((5, 40, 200)):
        monkeypatch.setattr(file_module, "BLOCK_BYTES", size)
        text = "x" + hard_text(seed, 3000)
        tokens, covered = read(mine, text.encode())
        assert tokens == theirs.encode(text, add_special_tokens=False).ids
        assert sum(covered) == len(text.encode())
        assert (len(covered) > len(text) / (size + 150)) == (make in CUT)


def _texts() -> dict[str, str]:
    code = Path(file_module.__file__).read_text(encoding="utf-8")
    return {
        "code": code * 3,
        "CRLF": code.replace("\n", "\r\n"),
        "CJK": "中文文本没有空格，所以分词比较困难。" * 900,
        "no spaces": "".join(chr(33 + x % 90) for x in range(0, 90000, 7)),
        "spaces": "a" + " " * 9000 + "b c " * 3000,
        "emoji": "👩‍👩‍👧‍👦🇩🇪 ok. " * 1500,
        "marks": "e\u0301a\u0300 fo\u0308o\n" * 2000,
        "special": "one</s>two <|end of text|>\n<s>three " * 700,
    }


@pytest.mark.parametrize("kind", _texts())
@pytest.mark.parametrize("make", [gpt2, llama2], ids=lambda make: make.__name__)
def test_ordinary_texts_are_read_in_small_blocks(make: Make, kind: str, saved: Callable[[Make], Path]) -> None:
    text = _texts()[kind]
    tokens, covered = read(FileTokenizer(saved(make)), text.encode())
    assert tokens == package(saved(make)).encode(text, add_special_tokens=False).ids
    assert max(covered) < 3 * file_module.BLOCK_BYTES + (9000 if kind == "spaces" else 0)


@pytest.mark.parametrize("skip", [False, True], ids=["shown", "hidden"])
@pytest.mark.parametrize("make", [*CUT, *WHOLE], ids=lambda make: make.__name__)
def test_tokens_one_by_one_give_the_text_of_all(make: Make, skip: bool, saved: Callable[[Make], Path]) -> None:
    mine, theirs = FileTokenizer(saved(make)), package(saved(make))
    rng = random.Random(0)
    for seed in range(4):
        ids = [rng.randrange(theirs.get_vocab_size() + 2) for _ in range(150)]  # two are no tokens
        for given in (ids, theirs.encode(hard_text(seed, 400), add_special_tokens=False).ids):
            decode = mine.decoder(skip)
            pieces = [decode(token) for token in given]
            assert "".join(pieces) + decode(None) == theirs.decode(given, skip_special_tokens=skip)
            assert sum(map(bool, pieces)) > len(given) / 4 or not skip  # text comes as it is complete


def test_characters_wait_for_their_bytes(saved: Callable[[Make], Path]) -> None:
    tokenizer = FileTokenizer(saved(llama2))
    decode = tokenizer.decoder()
    tokens = package(saved(llama2)).encode("a 🦊 b", add_special_tokens=False).ids
    pieces = [decode(token) for token in tokens]
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decode(None) == "a 🦊 b"
    shown, hidden = tokenizer.decoder(), tokenizer.decoder(skip_special_tokens=True)
    tokens = package(saved(llama2)).encode("a</s>b", add_special_tokens=False).ids
    assert "</s>" in "".join(map(shown, tokens)) and "</s>" not in "".join(map(hidden, tokens))


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "pair", "crosses"),
        [
            (O200K, "a ", False),
            (O200K, " a", True),
            (O200K, "a.", False),
            (O200K, ".\n", True),
            (O200K, "1a", False),
            (O200K, "11", True),
            (O200K, "'S", True),
            ("ab?c", "ac", True),
            ("ab?c", "cb", False),
            ("(?:ab)+", "ba", True),
            ("(?:ab)", "ba", False),
            ("a{2}", "aa", True),
            ("[a-c&&[^b]]x", "bx", False),
            ("[a-c&&[^b]]x", "cx", True),
            (r"a(?!b)c", "ac", True),
            (r"\x61\u0062", "ab", True),
        ],
    )
    def test_pairs_that_a_match_may_hold(self, pattern: str, pair: str, crosses: bool) -> None:
        assert Pattern(pattern).crosses(*pair) is crosses

    def test_characters_that_always_match(self) -> None:
        assert Pattern(r" ?\p{L}+|\s+(?!\S)|\s+").always_matches(" ")
        assert not Pattern(r" ?\p{L}+|\s+(?!\S)").always_matches(" ")
        assert not Pattern(r" ?\p{L}+").always_matches(" ")
        assert not Pattern(r"a*+a").always_matches("a")
        assert Pattern(r"\s+(?!\S)|a").looks_at("a") and not Pattern(r"\s+(?!\S)|a").looks_at(" ")

    @pytest.mark.parametrize(
        "pattern",
        [
            "(?<=a)b",
            "^a",
            "a$",
            r"\bword",
            "a*",
            "a(?=bc)",
            r"(a)\1",
            "(?i:ß)",
            "[[:alpha:]]",
            "(a",
            "a{1,2}+",
            "a{2}?",
        ],
    )
    def test_others_are_not_understood(self, pattern: str) -> None:
        with pytest.raises(Unsupported):
            Pattern(pattern)


class TestEncodings:
    def test_a_byte_order_mark_is_dropped(self, saved: Callable[[Make], Path]) -> None:
        tokenizer = FileTokenizer(saved(gpt2))
        assert read(tokenizer, BOM + b"a b")[0] == tokenizer.encode(BOM + b"a b").tolist() == read(tokenizer, b"a b")[0]
        assert sum(read(tokenizer, BOM + b"a b")[1]) == 6
        assert read(tokenizer, BOM)[0] == read(tokenizer, b"")[0] == []
        assert read(ByteTokenizer(), BOM)[0] == list(BOM)

    @pytest.mark.parametrize("before", [b"", b"a b ", b"word " * 2000, BOM + "ä ".encode() * 3000])
    @pytest.mark.parametrize("wrong", [b"\xff", b"\xe6\x97", b"\xed\xa0\x80"])
    def test_what_is_no_utf8_is_named_by_its_offset(
        self, before: bytes, wrong: bytes, saved: Callable[[Make], Path]
    ) -> None:
        text = before + wrong + b" after"
        tokenizer = FileTokenizer(saved(gpt2))
        for encode in (tokenizer.encode, lambda text: read(tokenizer, text)):
            with pytest.raises(TextError, match=f"at byte {len(before)}:") as raised:
                encode(text)
            assert "TITANS-E0108" in str(raised.value)
        replaced = FileTokenizer(saved(gpt2), encoding_errors="replace")
        tokens, covered = read(replaced, text)
        right = text.removeprefix(BOM).decode("utf-8", "replace")
        assert tokens == package(saved(gpt2)).encode(right, add_special_tokens=False).ids
        assert tokens == replaced.encode(text).tolist()
        assert sum(covered) == len(text)

    def test_utf16_is_named(self, saved: Callable[[Make], Path]) -> None:
        for encode in (FileTokenizer(saved(gpt2)).encode, lambda text: read(FileTokenizer(saved(gpt2)), text)):
            with pytest.raises(TextError, match="UTF-16"):
                encode("text".encode("utf-16"))

    def test_nul_and_line_ends_pass(self, saved: Callable[[Make], Path]) -> None:
        text = b"a\0b\r\nc\rd\n"
        tokenizer = FileTokenizer(saved(gpt2))
        decode = tokenizer.decoder()
        assert "".join(map(decode, read(tokenizer, text)[0])) + decode(None) == text.decode()

    def test_bytes_are_tokens_whatever_they_encode(self, tmp_path: Path) -> None:
        every = BOM + bytes(range(256)) * 40 + b"\r\n\0"
        (tmp_path / "every").write_bytes(every)
        tokens, covered = read_tokens(tmp_path / "every", ByteTokenizer(256))
        assert (tokens.astype(np.uint8).tobytes(), covered) == (every, len(every))
        (tmp_path / "empty").touch()
        with pytest.raises(EmptyTextError):
            read_tokens(tmp_path / "empty", ByteTokenizer())

    def test_bytes_wait_for_whole_characters(self) -> None:
        decode = ByteTokenizer().decoder()
        assert [decode(byte) for byte in "aé日".encode()] == ["a", "", "é", "", "", "日"]
        assert decode(None) == ""

    def test_invalid_bytes_and_other_tokens_are_shown(self) -> None:
        decode = ByteTokenizer().decoder()
        shown = "".join(decode(token) for token in (0x61, 0xFF, 0x62, 300, 0xE6, 0x161, 0xE6))
        assert shown + decode(None) == "a\ufffdb\ufffd\ufffd\ufffd\ufffd"


class TestVocabularies:
    def test_tokens_beyond_the_model(self, saved: Callable[[Make], Path]) -> None:
        path = saved(strips)
        size = package(path).get_vocab_size(with_added_tokens=False)
        mask = package(path).token_to_id("<mask>")
        assert mask >= size
        (note,) = check_vocabulary(path, size)
        assert "5 added tokens" in note and "'<mask>'" in note and str(mask) in note
        tokenizer = FileTokenizer(path, size)
        assert len(tokenizer.encode(b"a b"))
        for encode in (tokenizer.encode, lambda text: read(tokenizer, text)):
            with pytest.raises(TextError, match=r"0 to .*'<mask>'.*E0109"):
                encode(b"a <mask> b")
        with pytest.raises(TextError, match="0xff"):
            ByteTokenizer(200).encode(b"a\xff")
        with pytest.raises(CheckpointError, match=r"tokens beyond the model's vocabulary of 300.*E0314"):
            check_vocabulary(path, 300)

    def test_tokens_without_text(self, saved: Callable[[Make], Path]) -> None:
        size = package(saved(gpt2)).get_vocab_size()
        assert check_vocabulary(saved(gpt2), size) == []
        (note,) = check_vocabulary(saved(gpt2), size + 20)
        assert note.startswith(f"20 of the model's {size + 20} tokens") and f"the first is {size}" in note

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}', "\xff", "[" * 99999])
    def test_a_damaged_file(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"damaged file .*tokenizer\.json.*E0302"):
            check_vocabulary(tmp_path / "tokenizer.json", 10)

    def test_a_tokenizer_of_real_size(self, saved: Callable[[Make], Path], tmp_path: Path) -> None:
        """50,000 tokens, those that were trained among them."""
        spec = json.loads(saved(gpt2).read_text(encoding="utf-8"))
        vocabulary = spec["model"]["vocab"]
        letters = [token for token in vocabulary if len(token) == 1 and token.isalpha()]
        for left, right in _new_pairs(letters, vocabulary):
            spec["model"]["merges"].append([left, right])
            vocabulary[left + right] = len(vocabulary)
            if len(vocabulary) == 50_000:
                break
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        assert check_vocabulary(tmp_path / "tokenizer.json", 50_000) == []
        text = _texts()["code"] + hard_text(0, 20000)
        tokens, covered = read(FileTokenizer(tmp_path / "tokenizer.json", 50_000), text.encode())
        assert tokens == package(tmp_path / "tokenizer.json").encode(text, add_special_tokens=False).ids
        assert len(covered) > 5


def _new_pairs(letters: list[str], vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    known = list(vocabulary)
    for left in known:
        for right in (*letters, *known[300:]):
            if left + right not in vocabulary and not {"<", ">"} & {left[0], right[-1]}:
                yield left, right


def test_pieces_of_the_runtime_are_the_decoding_of_all_tokens(tmp_path: Path) -> None:
    """A decoder that drops the first space must not drop the space of a later piece."""
    tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install titans-export[tokenizer]")
    text = pytest.importorskip("titans_runtime._text", reason="the runtime is not built", exc_type=ImportError)
    words = {"▁Once": 0, "▁upon": 1, "▁a": 2, "▁time": 3, "<unk>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = text.TextSource({"kind": "file", "file": "tokenizer.json"}, str(tmp_path)).codec()
    ids = codec.encode("Once upon a time").tolist()
    assert ids == [0, 1, 2, 3]
    assert list(text.pieces(ids, codec.decoder(), [])) == ["Once", " upon", " a", " time"]
    assert "".join(text.pieces(ids, codec.decoder(), ["pon a"])) == "Once upon a"
