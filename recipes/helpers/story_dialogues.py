"""The word problems told turn by turn: a user message adds an event, a reply is an equation.

The model sees one event at a time and answers with one equation; a slip in a turn spoils the rest.
A narrator tells the next event after each reply, and says which reply was the first wrong one.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import word_problems
from helpers.warm_up import IGNORED_LABEL, Example, fit
from hf_distill import Attempt, Feedback, Hint

Row = dict[str, Any]

HINT = "hint : {correct}"
"""What stands behind the event of a turn: the value that the turn should arrive at."""

EQUATION = re.compile(r"\d+ ?[-+*] ?\d+ ?= ?(\d+)")

_UNAIDED_SHARE = 0.3
_UNHINTED_TURN_SHARE = 0.3
_WRONG_TURN_SHARE = 0.25
_TRAINED_UNHINTED_SHARE = 0.15


def error_hint() -> Hint:
    """Return the hint of the first wrong turn, inside the user's message of that turn."""
    return Hint(HINT, where="user", separator=" ", turn="wrong_turn", optional=True)


def _events(example: dict[str, str]) -> list[str]:
    """Return the user's message of each turn; the first also says what the story starts from."""
    start, *rest = example["problem"].split(" . ")
    events = [f"{sentence.removesuffix(' .')} ." for sentence in rest[:-1]]
    return [f"{start} . {events[0]}", *events[1:]]


def make_row(example: dict[str, str]) -> Row:
    """Make a row from a problem of `word_problems.make_problem`.

    Returns:
        `prompt` (the first event), `events` (the user's messages) and `values` (what each turn
        should arrive at).
    """
    events = _events(example)
    prompt = [{"role": "user", "content": events[0]}]
    return {"prompt": prompt, "events": events, "values": example["reference"].split()}


def make_splits(num_train: int, num_test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw training and held-out rows that share no story; held-out ones are always the same."""
    return (
        _draw(num_train, random.Random(f"dialogues {seed}"), held_out=False),
        _draw(num_test, random.Random("held-out dialogues"), held_out=True),
    )


def _draw(num_rows: int, rng: random.Random, *, held_out: bool) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        example = word_problems.make_problem(rng)
        if word_problems.is_held_out(example["problem"]) == held_out:
            rows.setdefault(example["problem"], make_row(example))
    return list(rows.values())


def value_of(reply: str) -> str | None:
    """Return the right side of a reply's equation, or None if the reply is no equation."""
    found = EQUATION.fullmatch(re.sub(r"(?<=\d) (?=\d)", "", reply.strip()))
    return found.group(1) if found else None


def first_wrong(row: Row, replies: Sequence[str]) -> int | None:
    """Return the number of the first reply whose value is not the story's, or None."""
    pairs = zip(replies, row["values"], strict=False)
    return next((i for i, (reply, value) in enumerate(pairs) if value_of(reply) != value), None)


def hinted(row: Row, turn: int) -> str:
    """Return the user's message of a turn with its value as a hint."""
    return f"{row['events'][turn]} {HINT.format(correct=row['values'][turn])}"


class Narrator:
    """Tells the next event after each reply, and what was the first wrong turn.

    Args:
        hints: whether every event carries its hint, to measure what the model does with hints.
    """

    def __init__(self, hints: bool = False) -> None:
        self.hints = hints

    def __call__(self, attempts: Sequence[Attempt]) -> list[Feedback]:
        """Give a `Feedback` for each attempt: the columns `wrong_turn` and `correct`, or None."""
        return [self._feedback(attempt) for attempt in attempts]

    def _feedback(self, attempt: Attempt) -> Feedback:
        row: Any = attempt.row
        replies = [m["content"] for m in attempt.messages if m["role"] == "assistant"]
        wrong, following = first_wrong(row, replies), attempt.turn + 1
        columns = {
            # a turn is a user message and a reply
            "wrong_turn": None if wrong is None else 2 * wrong,
            "correct": None if wrong is None else row["values"][wrong],
        }
        messages = []
        if following < len(row["events"]):
            text = hinted(row, following) if self.hints else row["events"][following]
            messages = [{"role": "user", "content": text}]
        return Feedback(messages, columns)


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    progress: bool = True,
) -> None:
    """Teach a fresh model, in place, to answer a turn whose value it is told.

    30 % of the dialogues have no hints at all. In the others most turns have one; turns without are
    rarely trained on. A quarter of the replies is wrong, not trained on, and the story goes on from
    them as the model will have to. No held-out story is used.
    """
    encoder = word_problems.WordEncoder(tokenizer)
    fit(
        model,
        _examples(encoder, random.Random(f"warm-up dialogues {seed}")),
        steps=steps,
        batch_size=64,
        pad_token_id=encoder.encode_text(word_problems.PAD)[0],
        progress=progress,
    )


def _examples(encoder: word_problems.WordEncoder, rng: random.Random) -> Iterator[Example]:
    while True:
        example = word_problems.make_problem(rng)
        if not word_problems.is_held_out(example["problem"]):
            ids, labels = _example(encoder, rng, example)
            if any(label != IGNORED_LABEL for label in labels):
                yield ids, labels


def _example(
    encoder: word_problems.WordEncoder, rng: random.Random, example: dict[str, str]
) -> Example:
    steps = example["solution"].split(" ; ")
    value, ids, labels = int(steps[0].split()[1]), list[int](), list[int]()
    unaided = rng.random() < _UNAIDED_SHARE
    for event, step in zip(_events(example), steps[1:-1], strict=True):
        _, operator, operand, _, _ = step.split()
        right = word_problems.apply(operator, value, int(operand))
        if not 0 < right <= word_problems.MAX_VALUE:
            break
        is_hinted = not unaided and rng.random() >= _UNHINTED_TURN_SHARE
        wrong = rng.random() < _WRONG_TURN_SHARE
        trained = not wrong and (is_hinted or unaided or rng.random() < _TRAINED_UNHINTED_SHARE)
        result = word_problems.wrong_value(rng, right) if wrong else right
        text = f"{event} {HINT.format(correct=right)}" if is_hinted else event
        context = encoder.encode_prompt([{"role": "user", "content": text}])
        reply = encoder.encode_text(f"{value} {operator} {operand} = {result} {word_problems.END}")
        ids += [*context, *reply]
        labels += [IGNORED_LABEL] * len(context)
        labels += reply if trained else [IGNORED_LABEL] * len(reply)
        value = result
    return ids, labels
