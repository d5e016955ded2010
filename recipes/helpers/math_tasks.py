"""Tasks with a checkable answer: rows for the trainers, and how an answer is read and compared.

A row has `prompt` (chat messages), `hint` (what the teacher may see), `completion` (a reference to
imitate, for supervised controls) and `answer` (a string).
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from helpers import word_problems
from hf_distill import Hint

Row = dict[str, Any]

GSM8K_REQUEST = (
    "\n\nSolve this step by step. End with a line that has #### and then only the final number."
)
GSM8K_HINT = (
    "Somebody has already solved this problem:\n{hint}\n\n"
    "Read the solution, then solve the problem yourself, step by step, in your own words. "
    "End with a line that has #### and then only the final number."
)
NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


@dataclass(frozen=True)
class Task:
    """Holds rows and the rule of grading.

    Args:
        name: for the log.
        train: rows to learn from.
        test: held-out rows.
        hint: how the teacher sees a row's hint.
        extract: from a completion's text to the answer in it, or None.
    """

    name: str
    train: list[Row]
    test: list[Row]
    hint: Hint
    extract: Callable[[str], str | None]

    def is_right(self, text: str, row: Row) -> bool:
        """Return whether a completion's answer is the row's, as numbers."""
        found = self.extract(text)
        return found is not None and to_number(found) == to_number(row["answer"])


def to_number(text: str) -> float:
    """Read a number written with thousands separators, a dollar sign or a trailing dot."""
    return float(text.replace(",", "").replace("$", "").rstrip("."))


def answer_after_marks(text: str) -> str | None:
    """Return the number behind the last ####, or None."""
    found = re.findall(r"####\s*(" + NUMBER + ")", text)
    return found[-1] if found else None


def last_number(text: str) -> str | None:
    """Return the last number of the text, or None."""
    found = re.findall(NUMBER, text)
    return found[-1] if found else None


def strip_calculator_marks(solution: str) -> str:
    """Return a GSM8K solution without its <<48/2=24>> annotations."""
    return re.sub(r"<<[^<>]*>>", "", solution)


def _gsm8k_row(example: Row) -> Row:
    solution = strip_calculator_marks(example["answer"])
    answer = answer_after_marks(solution)
    if answer is None:
        raise ValueError(f"a GSM8K answer must end with #### and a number, got {solution!r}")
    return {
        "prompt": [{"role": "user", "content": example["question"] + GSM8K_REQUEST}],
        "hint": solution,
        "completion": solution,
        "answer": answer,
    }


def gsm8k(source: str, num_test: int) -> Task:
    """Load GSM8K from a hub id, or from a folder that holds train.jsonl and test.jsonl.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
    """
    if Path(source).is_dir():
        files = {split: str(Path(source) / f"{split}.jsonl") for split in ("train", "test")}
        for file in files.values():
            if not Path(file).is_file():
                raise FileNotFoundError(f"a dataset folder must hold {Path(file).name}: no {file}")
        dataset: Any = load_dataset("json", data_files=files)
    else:
        dataset = load_dataset(source, "main")
    train = [_gsm8k_row(example) for example in dataset["train"]]
    test = [_gsm8k_row(example) for example in dataset["test"]][:num_test]
    return Task("gsm8k", train, test, Hint(GSM8K_HINT), answer_after_marks)


def arithmetic(num_test: int, seed: int) -> Task:
    """Make sums and differences of one- and two-digit numbers, each either train or test."""
    problems = [
        (a, b, sign)
        for a in range(2, 60)
        for b in range(2, 40)
        for sign in "+-"
        if sign == "+" or a >= b
    ]
    random.Random(f"arithmetic {seed}").shuffle(problems)
    rows = [_arithmetic_row(*problem) for problem in problems]
    hint = Hint("The correct answer is {answer}.", separator="\n")
    return Task("arithmetic", rows[num_test:], rows[:num_test], hint, last_number)


def _arithmetic_row(a: int, b: int, sign: str) -> Row:
    answer = str(a + b if sign == "+" else a - b)
    question = f"What is {a} {sign} {b}?\nReply with only the number."
    return {
        "prompt": [{"role": "user", "content": question}],
        "hint": answer,
        "completion": answer,
        "answer": answer,
    }


def stories(num_train: int, num_test: int, seed: int) -> Task:
    """Make the procedural word problems of the demo."""
    train, test = word_problems.make_splits(num_train, num_test, seed)
    hint = Hint(word_problems.HINT_TEMPLATE, where="system")
    return Task("word problems", train, test, hint, word_problems.extract_answer)
