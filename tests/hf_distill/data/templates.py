"""A tokenizer of single characters, and chat templates of the kinds that models have."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!+-=/<>|[]()_\n"

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"

# How the turns of real models end: (template, end token, other special tokens)
TEMPLATES = {
    # a line break behind the end token
    "chatml": (
        _LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + _END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>", ["<|im_start|>"],
    ),
    "gemma": (
        "<s>" + _LOOP + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n" + _END
        + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>", ["<start_of_turn>"],
    ),
    "llama3": (
        "<s>" + _LOOP + "<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot_id|>"
        + _END + "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}",
        "<|eot_id|>", ["<|header|>", "<|/header|>"],
    ),
    # the tokenizer's end token behind the last turn only
    "phi3": (
        _LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + _END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
        "<|end|>", ["<|user|>", "<|assistant|>", "<|system|>"],
    ),
    # the tokenizer's own, behind a space
    "llama2": (
        _LOOP + "{% if m.role == 'assistant' %} {{ m.content }} </s>"
        "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}" + _END,
        "</s>", [],
    ),
    # two special tokens behind a reply, the second of which ends it
    "command": (
        _LOOP + "<|turn|><|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end_response|>{% endif %}<|end_turn|>" + _END
        + "{% if add_generation_prompt %}<|turn|><|assistant|>{% endif %}",
        "<|end_turn|>",
        ["<|turn|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end_response|>"],
    ),
}  # fmt: skip
# writes an empty thought in front of the last reply, and takes thoughts from earlier ones
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP + "{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n" + _END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
# ends a reply with the first token of the next turn, which the model samples too
NEXT_TURN = (
    _LOOP + "<|{{ m.role }}|>\n{{ m.content }}" + _END
    + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)  # fmt: skip


def characters(
    template: str | None = None,
    special: Sequence[str] = (),
    around: str | None = None,
    words: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """One id a character; <pad> 0, <s> 1, </s> 2 (the end token), <unk> 3.

    Args:
        template: of chats.
        special: tokens besides.
        around: what is put around a text, such as "<s> $A </s>".
        words: of several characters that are one id, but not special.
    """
    known = ["<pad>", "<s>", "</s>", "<unk>", *special, *words, *LETTERS]
    raw = Tokenizer(models.WordLevel({x: i for i, x in enumerate(known)}, unk_token="<unk>"))
    whole = "|".join(word.replace("|", r"\|") for word in words)
    raw.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"{whole}{'|' * bool(words)}[\s\S]"), "isolated"
    )
    raw.decoder = decoders.Fuse()
    if around:
        raw.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", additional_special_tokens=list(special),
    )  # fmt: skip
    made.chat_template = template
    return made


def family(name: str) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer with the template of a family, and the id that ends its turns."""
    template, end, special = TEMPLATES[name]
    made = characters(template, [*special, *({end} - {"</s>"})])
    return made, made.convert_tokens_to_ids(end)
