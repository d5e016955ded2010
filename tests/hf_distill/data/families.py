"""Tokenizers of every family, learnt here from a few sentences."""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import chain, pairwise

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The answer is 12 + 30 = 42, and the other answers are wrong.",
    "def add(first, second):\n    return first + second\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "naïve café, 東京都 and 北京, emoji 🙂🙃 too",
    "think step by step; then say the answer and the reason for the answer.",
] * 2
TEMPLATE = (
    "{% for m in messages %}{{ '<role>' + m['role'] + '\n' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<end>", "<role>"]


def _wrapped(made: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<role>"],
        **more,
    )
    fast.chat_template = TEMPLATE
    return fast


def _merges(words: list[str], count: int, inside: str = "") -> list[tuple[str, str]]:
    """The most frequent pair at a time, the last by its letters of those as frequent.

    The trainers of the library choose among equally frequent pairs otherwise in each process.
    """
    split = Counter(tuple(inside * (i > 0) + x for i, x in enumerate(word)) for word in words)
    made: list[tuple[str, str]] = []
    for _ in range(count):
        pairs = Counter[tuple[str, str]]()
        for word, times in split.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        one, other = best = max(pairs, key=lambda x: (pairs[x], x))
        made.append(best)
        joined, again = one + other.removeprefix(inside), Counter[tuple[str, ...]]()
        for word, times in split.items():
            parts = list(word)
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = [joined]
            again[tuple(parts)] += times
        split = again
    return made


def _words(made: Tokenizer, texts: list[str]) -> list[str]:
    split, normal = made.pre_tokenizer, made.normalizer
    texts = [normal.normalize_str(x) for x in texts] if normal else texts
    return [word for text in texts for word, _ in split.pre_tokenize_str(text)]


def _vocab(*tokens: Iterable[str]) -> dict[str, int]:
    return {x: i for i, x in enumerate(dict.fromkeys(chain(SPECIAL, *tokens)))}


def byte_level(count: int = 80) -> PreTrainedTokenizerFast:
    """GPT-2's kind: every byte is a token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pairs = _merges(_words(made, TEXTS), count)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.model = models.BPE(_vocab(alphabet, (a + b for a, b in pairs)), pairs)
    return _wrapped(made)


def sentence_piece(count: int = 80) -> PreTrainedTokenizerFast:
    """Llama 2's kind: BPE with ▁ for spaces, and bytes for what it does not know."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    replace, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), first])
    words = [x for x in _words(made, [TEXTS[0], TEXTS[4]]) if x.isprintable()]
    pairs, characters = _merges(words, count), sorted({x for word in words for x in word})
    tokens = [f"<0x{i:02X}>" for i in range(256)], characters, (a + b for a, b in pairs)
    vocab = _vocab(["<unk>"], *tokens)
    made.model = models.BPE(vocab, pairs, byte_fallback=True, unk_token="<unk>")
    return _wrapped(made, unk_token="<unk>")


def unigram(count: int = 80) -> PreTrainedTokenizerFast:
    """T5's kind: NFKC, ▁ for spaces, unknown characters."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    words = _words(made, TEXTS[:3])
    pairs, characters = _merges(words, count), sorted({x for word in words for x in word})
    vocab = _vocab(["<unk>"], (a + b for a, b in pairs), characters)
    scores = [(x, -1.0 - i / len(vocab)) for x, i in vocab.items()]
    made.model = models.Unigram(scores, vocab["<unk>"])
    return _wrapped(made, unk_token="<unk>")


def word_piece(count: int = 80) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, no accents, no whitespace, ## inside of words."""
    made = Tokenizer(models.WordPiece())
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    words = _words(made, TEXTS[:3])
    pairs, characters = _merges(words, count, "##"), sorted({x for word in words for x in word})
    joined = (a + b.removeprefix("##") for a, b in pairs)
    vocab = _vocab(["<unk>"], characters, (f"##{x}" for x in characters), joined)
    made.model = models.WordPiece(vocab, unk_token="<unk>")
    return _wrapped(made, unk_token="<unk>")


FAMILIES = {
    "byte_level": cache(byte_level),
    "byte_level_small": cache(lambda: byte_level(10)),
    "sentence_piece": cache(sentence_piece),
    "unigram": cache(unigram),
    "word_piece": cache(word_piece),
}
WHOLE = ("byte_level", "byte_level_small", "sentence_piece")  # of which every text is one
