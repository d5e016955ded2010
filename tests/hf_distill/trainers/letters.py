"""A second tokenizer, of single characters: its ids and its lengths are not the words'."""

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.hf_distill.trainers import models

SPECIAL = ("<end>", "<fill>", "<unk>", "<role>")
CHARACTERS = sorted(set(models.TEXT) | {"\n"})
SIZE = len(SPECIAL) + len(CHARACTERS)
TEMPLATE = (
    "{% for m in messages %}{{ '<role>' + m['role'] + '\n' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>assistant\n' }}{% endif %}"
)


def letters() -> PreTrainedTokenizerFast:
    """Its end token is id 0, its padding 1; every other character has an id of its own."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    split = Tokenizer(kinds.WordLevel(vocab, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=split,
        unk_token="<unk>",
        eos_token="<end>",
        pad_token="<fill>",
        additional_special_tokens=["<role>"],
    )
    made.chat_template = TEMPLATE
    return made


def reader(seed: int = 1, vocab_size: int = SIZE) -> LlamaForCausalLM:
    """A model of such ids, for rows of up to 256 characters."""
    return models.llama(
        seed,
        vocab_size=vocab_size,
        pad_token_id=1,
        eos_token_id=0,
        bos_token_id=None,
        max_position_embeddings=256,
    )
