"""Tokenizers of every family, trained here on a few sentences."""

import json
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
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


def byte_level(size: int = 340) -> PreTrainedTokenizerFast:
    """GPT-2's kind: every byte is a token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return _wrapped(made)


def sentence_piece(size: int = 380) -> PreTrainedTokenizerFast:
    """Llama 2's kind: BPE with ▁ for spaces, and bytes for what it does not know."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    replace, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), first])
    own = [*SPECIAL, "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=own, limit_alphabet=40, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    state = made.to_str()
    made = Tokenizer.from_str(_without_byte_tokens(state))
    return _wrapped(made, unk_token="<unk>")


def _without_byte_tokens(state: str) -> str:
    """Bytes are tokens of the vocabulary, not added ones that would be found in texts."""
    made = json.loads(state)
    made["added_tokens"] = [x for x in made["added_tokens"] if not x["content"].startswith("<0x")]
    return json.dumps(made)


def unigram(size: int = 180) -> PreTrainedTokenizerFast:
    """T5's kind: NFKC, ▁ for spaces, unknown characters."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator(TEXTS[:3], trainer)
    return _wrapped(made, unk_token="<unk>")


def word_piece(size: int = 200) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, no accents, no whitespace, ## inside of words."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, "<unk>"], show_progress=False
    )
    made.train_from_iterator(TEXTS[:3], trainer)
    return _wrapped(made, unk_token="<unk>")


FAMILIES = {
    "byte_level": cache(byte_level),
    "byte_level_small": cache(lambda: byte_level(270)),
    "sentence_piece": cache(sentence_piece),
    "unigram": cache(unigram),
    "word_piece": cache(word_piece),
}
WHOLE = ("byte_level", "byte_level_small", "sentence_piece")  # of which every text is one
