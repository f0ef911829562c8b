"""Small tokenizers of every kind that real models have, trained here, and texts that are hard to cut."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = ("<s>", "</s>", "<|end of text|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, isn't it? We'll see 12345 foxes and   3.14159 dogs.",
    "def main(argv):\n    for i in range(10):\n\t\tprint(f'{i:>4}', end='')\n    return x[i] == y and not z\n\n",
    "これは日本語の文章です。今日は天気がいいですね、散歩に行きましょう。",
    "中文文本没有空格，所以分词比较困难。我们来测试一下！再来一句？",
    "Ünïcödé naïve café résumé, Москва и Санкт-Петербург. Ελληνικά γράμματα",
    "<html><body class='a'>http://example.org/a?b=c&d=e#f</body></html>\r\n\r\n  indented\r\n",
    "aaaaaaaa bbbbbbbb abababab          end\n\n\n\nnext ``quoted'' text --- dashes ...",
]


def _bpe(unk: str | None = None, **options: Any) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token=unk, **options))


def _byte_level(regex: str | None = None, prefix: bool = False, **options: Any) -> Tokenizer:
    tokenizer = _bpe(**options)
    if regex is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _train(tokenizer: Tokenizer, kind: str = "bpe", special: tuple[str, ...] = SPECIAL, **options: Any) -> Tokenizer:
    common: dict[str, Any] = {"vocab_size": 700, "special_tokens": list(special), "show_progress": False, **options}
    trainer = {
        "bpe": trainers.BpeTrainer,
        "unigram": trainers.UnigramTrainer,
        "wordpiece": trainers.WordPieceTrainer,
        "wordlevel": trainers.WordLevelTrainer,
    }[kind](**common)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def _alphabet() -> dict[str, Any]:
    return {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}


def gpt2() -> Tokenizer:
    return _train(_byte_level(), **_alphabet())


def gpt2_prefix() -> Tokenizer:
    return _train(_byte_level(prefix=True), **_alphabet())


def llama3() -> Tokenizer:
    return _train(_byte_level(CL100K, ignore_merges=True), **_alphabet())


def qwen() -> Tokenizer:
    tokenizer = _byte_level(POSSESSIVE)
    tokenizer.normalizer = normalizers.NFC()
    return _train(tokenizer, **_alphabet())


def o200k() -> Tokenizer:
    return _train(_byte_level(O200K), **_alphabet())


def deepseek() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥\u3040-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(DEEPSEEK), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _train(tokenizer, **_alphabet())


def bloom() -> Tokenizer:
    return _train(_byte_level(BLOOM), **_alphabet())


def starcoder() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return _train(tokenizer, **_alphabet())


def falcon() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    return _train(tokenizer, **_alphabet())


def clip() -> Tokenizer:
    tokenizer = _bpe("<|end of text|>", end_of_word_suffix="</w>", fuse_unk=False)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, end_of_word_suffix="</w>", **_alphabet())


def _llama(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    special = ("<unk>", *SPECIAL, *BYTES)
    _train(tokenizer, special=special, vocab_size=900, **options)
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in BYTES
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _merged_by_words(tokenizer: Tokenizer, scheme: str) -> Tokenizer:
    """Merges learned within words, as SentencePiece learns them."""
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    return _llama(tokenizer)


def llama2() -> Tokenizer:
    tokenizer = _merged_by_words(_bpe("<unk>", byte_fallback=True, fuse_unk=True), "always")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = _llama_decoder()
    return tokenizer


def llama_first() -> Tokenizer:
    tokenizer = _merged_by_words(_bpe("<unk>", byte_fallback=True, fuse_unk=True), "first")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.decoder = _llama_decoder()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = _merged_by_words(_bpe("<unk>", byte_fallback=True, fuse_unk=True), "always")
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = _merged_by_words(_bpe("<unk>", byte_fallback=True, fuse_unk=True), "never")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _train(tokenizer, "wordpiece", ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", *SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32, pad_id=4, pad_token="[PAD]")
    return tokenizer


def t5() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    return _train(tokenizer, "unigram", ("<unk>", *SPECIAL), unk_token="<unk>")


def albert() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    return _train(tokenizer, "unigram", ("<unk>", *SPECIAL), unk_token="<unk>")


def strips() -> Tokenizer:
    """Added tokens that take the spaces beside them, and some found in normalised text."""
    tokenizer = gpt2()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(
        [
            AddedToken("<mask>", lstrip=True, normalized=False),
            AddedToken("[sep]", rstrip=True, normalized=False),
            AddedToken("fox", single_word=True, normalized=False),
            AddedToken("Lazy Dog", normalized=True),
            AddedToken("end.", lstrip=True, rstrip=True),
        ]
    )
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, "wordlevel", ("<unk>", *SPECIAL))


def delimiter() -> Tokenizer:
    tokenizer = _bpe("<unk>", fuse_unk=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.CharDelimiterSplit("e"),
            pre_tokenizers.Punctuation("merged_with_previous"),
            pre_tokenizers.Split(Regex("[a-f]+"), "merged_with_next"),
            pre_tokenizers.Split(Regex(" +"), "contiguous"),
        ]
    )
    return _train(tokenizer, special=("<unk>", *SPECIAL))


def suffixes() -> Tokenizer:
    tokenizer = _bpe("<unk>", end_of_word_suffix="</w>")
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _train(tokenizer, special=("<unk>", *SPECIAL), end_of_word_suffix="</w>")


def scripts() -> Tokenizer:
    """Not cut: the script of a character depends on those before it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.UnicodeScripts(), pre_tokenizers.Metaspace("▁", "always")]
    )
    return _train(tokenizer, "unigram", ("<unk>", *SPECIAL), unk_token="<unk>")


def whole() -> Tokenizer:
    """Not cut: the model weighs the whole text."""
    tokenizer = t5()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    return tokenizer


CUT: tuple[Callable[[], Tokenizer], ...] = (
    gpt2,
    gpt2_prefix,
    llama3,
    qwen,
    o200k,
    deepseek,
    bloom,
    starcoder,
    falcon,
    clip,
    llama2,
    llama_first,
    metaspace,
    gemma,
    bert,
    t5,
    albert,
    strips,
    word_level,
    delimiter,
    suffixes,
)
WHOLE: tuple[Callable[[], Tokenizer], ...] = (scripts, whole)


def _pieces(rng: random.Random) -> Iterator[str]:
    corpus = " ".join(CORPUS)
    special = [*SPECIAL, "<mask>", " <mask> ", "[sep]  ", "fox", "Lazy Dog", "end.", " end. ", "<s", "of text|>"]
    hard = ["\r\n", "\n", "\t", "  ", "\u00a0", "\u3000", "\0", "\ufeff", "''", "``", "e\u0301", "\u0301", "ﬁ"]
    hard += ["👩\u200d👩\u200d👧\u200d👦", "🇩🇪🇫🇷", "👍🏽", "한국어", "ก็ำ", "नमस्ते", "؀1", "İ", "ſ", "\u200d", "ß", "½"]
    hard += ["▁", "▁▁", "ー", "\u3099", "ა"]
    while True:
        kind = rng.randrange(10)
        if kind < 3:
            at = rng.randrange(len(corpus))
            yield corpus[at : at + rng.randrange(1, 40)]
        elif kind < 5:
            yield rng.choice(hard)
        elif kind == 5:
            yield rng.choice(special)
        elif kind == 6:
            yield rng.choice(" \n\t0123456789ab.字") * rng.choice((1, 2, 3, 30))
        elif kind == 7:
            yield chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA0, 0x3000), rng.randrange(0x3000, 0xD7FF))))
        elif kind == 8:
            yield "".join(rng.choice("abAB01 .,\n字。") for _ in range(rng.randrange(1, 12)))
        else:
            yield " "


def hard_text(seed: int, length: int) -> str:
    """A text of all that is hard to cut."""
    rng = random.Random(seed)
    pieces, size = _pieces(rng), 0
    text = []
    while size < length:
        text.append(next(pieces))
        size += len(text[-1])
    return "".join(text)
