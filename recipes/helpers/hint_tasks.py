"""Tiny tasks on which self-distillation helps or hurts, each with the warm-up of its student."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import math_tasks, word_problems
from helpers.math_tasks import Row, Task
from helpers.warm_up import IGNORED_LABEL, Example, fit
from hf_distill import Hint

RULES = [f"{sign} {k}" for sign in "+-" for k in range(2, 10)]
RULE = "+ 7"  # that all rows of the rule task share
_NUMBERS = range(10, 90)
_UNAIDED_RULE_SHARE = 0.2
_UNAIDED_SHORTCUT_SHARE = 0.7
_CONTINUED_SHARE = 0.5


class HintTask(NamedTuple):
    """Says how a task's rows are made, and how a fresh model becomes its student.

    Attributes:
        make: the task of a number of training and held-out rows and a seed. Rows have a column
            `wrong`, a hint that does not fit them.
        warm_up: trains a fresh model in place, for a number of steps and with a seed.
    """

    make: Callable[[int, int, int], Task]
    warm_up: Callable[[LlamaForCausalLM, PreTrainedTokenizerFast, int, int], None]


def _hint() -> Hint:
    return Hint(word_problems.HINT_TEMPLATE, where="system")


def _with_wrong(rows: list[Row]) -> list[Row]:
    """Add the hint of the next row whose hint is another one."""
    made = []
    for i, row in enumerate(rows):
        behind = (rows[(i + k) % len(rows)]["hint"] for k in range(1, len(rows)))
        made.append({**row, "wrong": next((x for x in behind if x != row["hint"]), row["hint"])})
    return made


def words(num_train: int, num_test: int, seed: int) -> Task:
    """Make the word problems of the demo; the hint is the intermediate results."""
    task = math_tasks.stories(num_train, num_test, seed)
    train, test = _with_wrong(task.train), _with_wrong(task.test)
    return Task("words", train, test, task.hint, task.extract)


def shortcut(num_train: int, num_test: int, seed: int) -> Task:
    """Make word problems whose hint is the answer alone: who sees it needs no steps."""
    task = math_tasks.stories(num_train, num_test, seed)
    train = _with_wrong([{**row, "hint": row["answer"]} for row in task.train])
    test = _with_wrong([{**row, "hint": row["answer"]} for row in task.test])
    return Task("shortcut", train, test, task.hint, task.extract)


def rule(num_train: int, num_test: int, seed: int) -> Task:
    """Make questions whose answer follows from one rule; the hint is the rule, no answer."""
    rng = random.Random(f"rule {seed}")
    train = [_rule_row(rng, held_out=False) for _ in range(num_train)]
    drawn = random.Random("held-out rules")
    test = [_rule_row(drawn, held_out=True) for _ in range(num_test)]
    return Task("rule", train, test, _hint(), word_problems.extract_answer)


def _question(rng: random.Random, held_out: bool) -> tuple[int, str]:
    """Draw a number, one in four of which is held out, and a question about it."""
    start = rng.choice([n for n in _NUMBERS if (n % 4 == 1) == held_out])
    story = word_problems.make_problem(rng)["problem"].split()
    return start, f"{story[0]} has {start} {story[3]} . how many {story[3]} ?"


def _applied(start: int, told: str) -> tuple[str, int]:
    operator, operand = told.split()
    value = word_problems.apply(operator, start, int(operand))
    return f"{start} {told} = {value} ; #### {value}", value


def _rule_row(rng: random.Random, held_out: bool) -> Row:
    start, question = _question(rng, held_out)
    completion, value = _applied(start, RULE)
    return {
        "prompt": [{"role": "user", "content": question}],
        "hint": RULE,
        "wrong": rng.choice([x for x in RULES if x != RULE]),
        "completion": completion,
        "answer": str(value),
    }


def _fit(
    examples: Callable[[word_problems.WordEncoder, random.Random], Iterator[Example]],
) -> Callable[[LlamaForCausalLM, PreTrainedTokenizerFast, int, int], None]:
    def warm_up(
        model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
    ) -> None:
        encoder = word_problems.WordEncoder(tokenizer)
        pad = encoder.encode_text(word_problems.PAD)[0]
        drawn = examples(encoder, random.Random(f"warm-up {seed}"))
        fit(model, drawn, steps=steps, batch_size=64, pad_token_id=pad, progress=False)

    return warm_up


def _example(
    encoder: word_problems.WordEncoder, question: str, hint: str | None, given: str, target: str
) -> Example:
    messages = [{"role": "user", "content": question}]
    if hint is not None:
        told = word_problems.HINT_TEMPLATE.format(hint=hint)
        messages.insert(0, {"role": "system", "content": told})
    context = encoder.encode_prompt(messages) + encoder.encode_text(given)
    trained = encoder.encode_text(f"{target} {word_problems.END}")
    return [*context, *trained], [IGNORED_LABEL] * len(context) + trained


def _rule_examples(encoder: word_problems.WordEncoder, rng: random.Random) -> Iterator[Example]:
    """Yield questions with a rule, and some without, whose answer follows any rule."""
    while True:
        start, question = _question(rng, held_out=False)
        told = rng.choice(RULES)
        hint = None if rng.random() < _UNAIDED_RULE_SHARE else told
        yield _example(encoder, question, hint, "", _applied(start, told)[0])


def _shortcut_examples(encoder: word_problems.WordEncoder, rng: random.Random) -> Iterator[Example]:
    """Yield problems without a hint, solved in steps, and with it, answered at once.

    Half of those with a hint have begun with steps already, and go on with them.
    """
    while True:
        made = word_problems.make_problem(rng)
        if word_problems.is_held_out(made["problem"]):
            continue
        steps = made["solution"].split(" ; ")
        if rng.random() < _UNAIDED_SHORTCUT_SHARE:
            yield _example(encoder, made["problem"], None, "", made["solution"])
        elif rng.random() < _CONTINUED_SHARE:
            at = rng.randrange(1, len(steps))
            given, rest = " ; ".join(steps[:at]) + " ;", " ; ".join(steps[at:])
            yield _example(encoder, made["problem"], made["answer"], given, rest)
        else:
            yield _example(encoder, made["problem"], made["answer"], "", steps[-1])


def _warm_up_words(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    word_problems.warm_up(model, tokenizer, steps=steps, seed=seed, progress=False)


TASKS: dict[str, HintTask] = {
    "rule": HintTask(rule, _fit(_rule_examples)),
    "shortcut": HintTask(shortcut, _fit(_shortcut_examples)),
    "words": HintTask(words, _warm_up_words),
}
