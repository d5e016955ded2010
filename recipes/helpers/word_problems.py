"""A procedural word-problem task small enough to distil on one CPU core in a few minutes.

A problem is a short story with two or three arithmetic steps on whole numbers from 1 to 99. The
model writes one equation a step; the *reference* a person supplies is terser (only the intermediate
results), so it can be copied as a hint but is a poor completion to imitate. `warm_up` teaches a
fresh model to read such a hint; without one it solves about a quarter of the problems, and this
is the gap that self-distillation closes.

Problems are split by a checksum of their text: about one in eight is held out, and neither
training rows nor the warm-up ever contain a held-out text, whatever the seeds.
"""

import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.warm_up import IGNORED_LABEL, fit

HINT_TEMPLATE = "hint : {hint}"
"""System message by which a teacher sees the hint of a problem."""

MAX_VALUE = 99
"""Largest number that a problem's steps may reach; the smallest is 1."""

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
ROLE_TOKENS = ("<user>", "<assistant>", "<system>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

_NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe")
_ITEMS = ("apples", "coins", "books", "pens", "cards", "shells")
_PHRASES = {
    "+": ("he buys {k} more .", "he finds {k} more .", "he wins {k} ."),
    "-": ("he loses {k} .", "he gives {k} away .", "he eats {k} ."),
    "*": ("he then has {k} times as many .", "the pile grows {k} fold ."),
}
_OPERANDS = {"+": (2, 9), "-": (2, 9), "*": (2, 3)}
# The words of solutions and questions, and those that a hint about a wrong line is written with.
_OTHER_WORDS = "has how many ? start = + - * ; #### . hint wrong line correct : the he"

_TEST_SEED = "held-out"
_HELD_OUT_ONE_IN = 8

_UNAIDED_SHARE = 0.3
_PLANTED_ERROR_SHARE = 0.3

Message = Mapping[str, str]


def make_problem(rng: random.Random) -> dict:
    """Draws one word problem.

    Args:
        rng: Source of randomness; its state advances.

    Returns:
        `problem` (the story and the question), `solution` (one equation a step, ending `#### N`),
        `reference` (the intermediate results, the last of which is N) and `answer` (N), all
        strings of words separated by single spaces.
    """
    name, item = rng.choice(_NAMES), rng.choice(_ITEMS)
    steps, start = None, 0
    while steps is None:
        start = rng.randint(2, 30)
        steps = _draw_steps(rng, start, rng.randint(2, 3))
    sentences = [sentence for sentence, _, _ in steps]
    equations = [equation for _, equation, _ in steps]
    values = [str(value) for _, _, value in steps]
    return {
        "problem": " ".join([f"{name} has {start} {item} .", *sentences, f"how many {item} ?"]),
        "solution": " ; ".join([f"start {start}", *equations, f"#### {values[-1]}"]),
        "reference": " ".join(values),
        "answer": values[-1],
    }


def make_rows(num_rows: int, seed: int) -> list[dict]:
    """Draws training rows: distinct problems, none of them held out.

    Args:
        num_rows: Number of rows, at least 0.
        seed: Rows are the same for the same seed; a longer list begins with the shorter one.

    Returns:
        Rows of `prompt` (a list with one user message), `hint` (the terse reference),
        `completion` (the reference with its final answer, to compare with supervised training)
        and `answer`.

    Raises:
        ValueError: If `num_rows` is negative.
    """
    return _draw_rows(num_rows, random.Random(f"rows {seed}"), held_out=False)


def make_splits(num_train: int, num_test: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Draws training and held-out rows that share no problem text.

    Args:
        num_train: Number of training rows, at least 0.
        num_test: Number of held-out rows, at least 0.
        seed: Chooses the training rows. The held-out rows are the same for every seed.

    Returns:
        Training rows and held-out rows, as `make_rows` returns them.

    Raises:
        ValueError: If a number of rows is negative.
    """
    test = _draw_rows(num_test, random.Random(_TEST_SEED), held_out=True)
    return make_rows(num_train, seed), test


def is_held_out(problem: str) -> bool:
    """Says whether a problem text belongs to the held-out part, about one in eight.

    A checksum decides, not a list, so that training code need not know how many problems an
    evaluation will use.
    """
    return zlib.crc32(problem.encode()) % _HELD_OUT_ONE_IN == 0


def extract_answer(text: str) -> str | None:
    """Returns the digits after the first `####`, without spaces between them, or None."""
    match = re.search(r"####[ \t]*(\d(?:[ \t]*\d)*)", text)
    return re.sub(r"\s", "", match.group(1)) if match else None


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the task's word-level tokenizer: one token a word, one a digit, padding on the left.

    Its chat template writes `<role> content <end>` for each message.
    """
    words = set(_OTHER_WORDS.split()) | set("0123456789") | {*_NAMES, *_ITEMS}
    for phrases in _PHRASES.values():
        words.update(*(phrase.format(k="").split() for phrase in phrases))
    vocabulary = [PAD, END, *ROLE_TOKENS, UNKNOWN, *sorted(words)]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLE_TOKENS),
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Builds the task's untrained model, a Llama of 3 layers and 372 thousand parameters.

    Args:
        tokenizer: Gives the size of the vocabulary and the ids of padding and end of text.
        seed: Seed of the initial weights. The caller's random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=288,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=_token_id(tokenizer, PAD),
        eos_token_id=_token_id(tokenizer, END),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return tokenizer.get_vocab()[token]


class WordEncoder:
    """Encodes this task's texts from a table of words, without calling the tokenizer again.

    The tokenizer cuts at white space before anything else, so the ids of a text are those of its
    words in turn. Warm-up encodes tens of thousands of texts made of a few dozen words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, equal to the tokenizer's own."""
        return [token for word in text.split() for token in self._encode_word(word)]

    def encode_prompt(self, messages: Iterable[Message]) -> list[int]:
        """Returns the ids that the chat template gives with `add_generation_prompt=True`."""
        turns = [f"<{m['role']}> {m['content']} {END}" for m in messages]
        return self.encode_text(" ".join([*turns, "<assistant>"]))

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._ids:
            self._ids[word] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        return self._ids[word]


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int = 400,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Trains a fresh model, in place, to solve problems whose reference it sees as a hint.

    Most examples carry the reference in a system message. 30 % carry none: enough for the model to
    be fluent but weak without a hint. In 30 % of the others a wrong step is planted after the
    prompt and only what follows is trained on: the model learns to go on from its own slips,
    which a teacher that scores a student's completions has to do. No held-out problem is used.

    Args:
        model: Model from `build_model`; left in the training or evaluation mode it came in.
        tokenizer: Tokenizer from `build_tokenizer`.
        steps: Number of optimizer steps, at least 1.
        batch_size: Examples in a step, at least 1.
        seed: Chooses the examples. Same seed and same initial weights, same result.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `steps` or `batch_size` is below 1.
    """
    fit(
        model,
        _warm_up_examples(WordEncoder(tokenizer), _token_id(tokenizer, END), seed),
        steps=steps,
        batch_size=batch_size,
        pad_token_id=_token_id(tokenizer, PAD),
        progress=progress,
    )


def _draw_steps(
    rng: random.Random, value: int, num_steps: int
) -> list[tuple[str, str, int]] | None:
    """Returns (sentence, equation, result) for each step, or None when a result is out of range."""
    steps = []
    for _ in range(num_steps):
        operator = rng.choice("+-*")
        operand = rng.randint(*_OPERANDS[operator])
        result = apply(operator, value, operand)
        if not 0 < result <= MAX_VALUE:
            return None
        sentence = rng.choice(_PHRASES[operator]).format(k=operand)
        steps.append((sentence, f"{value} {operator} {operand} = {result}", result))
        value = result
    return steps


def apply(operator: str, left: int, right: int) -> int:
    """Returns the result of one step."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _draw_rows(num_rows: int, rng: random.Random, *, held_out: bool) -> list[dict]:
    if num_rows < 0:
        raise ValueError(f"the number of rows must be at least 0, got {num_rows}")
    rows: dict[str, dict] = {}
    while len(rows) < num_rows:
        example = make_problem(rng)
        problem = example["problem"]
        if is_held_out(problem) == held_out:
            rows.setdefault(problem, _as_row(example))
    return list(rows.values())


def _as_row(example: Mapping[str, str]) -> dict:
    return {
        "prompt": [{"role": "user", "content": example["problem"]}],
        "hint": example["reference"],
        "completion": f"{example['reference']} ; #### {example['answer']}",
        "answer": example["answer"],
    }


def _warm_up_examples(
    encoder: WordEncoder, end_id: int, seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields ids and labels without end; the context has none."""
    rng = random.Random(f"warm-up {seed}")
    while True:
        example = make_problem(rng)
        if is_held_out(example["problem"]):
            continue
        messages = [{"role": "user", "content": example["problem"]}]
        given, target = "", example["solution"]
        if rng.random() >= _UNAIDED_SHARE:
            hint = HINT_TEMPLATE.format(hint=example["reference"])
            messages.insert(0, {"role": "system", "content": hint})
            if rng.random() < _PLANTED_ERROR_SHARE:
                given, target = _plant_error(rng, target) or (given, target)
        context = encoder.encode_prompt(messages) + encoder.encode_text(given)
        trained = [*encoder.encode_text(target), end_id]
        yield [*context, *trained], [IGNORED_LABEL] * len(context) + trained


def _plant_error(rng: random.Random, solution: str) -> tuple[str, str] | None:
    """Makes one result wrong and goes on consistently from it.

    Returns:
        The solution up to and including the wrong step, and what should follow it; None when a
        later result would leave the range of the task.
    """
    start, *equations, _ = solution.split(" ; ")
    position = rng.randrange(len(equations))
    left, right = equations[position].split(" = ")
    value = wrong_value(rng, int(right))
    given = [start, *equations[:position], f"{left} = {value} ;"]
    rest = []
    for equation in equations[position + 1 :]:
        _, operator, operand, _, _ = equation.split()
        result = apply(operator, value, int(operand))
        if not 0 < result <= MAX_VALUE:
            return None
        rest.append(f"{value} {operator} {operand} = {result}")
        value = result
    return " ; ".join(given), " ; ".join([*rest, f"#### {value}"])


def wrong_value(rng: random.Random, right: int) -> int:
    """Returns a result that a slip could give, in the range of the task."""
    near = [right + slip for slip in (-10, -2, -1, 1, 2, 10)]
    anywhere = rng.randint(1, MAX_VALUE)
    return rng.choice([v for v in (*near, anywhere) if 0 < v <= MAX_VALUE and v != right])
