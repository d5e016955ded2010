"""Which columns rows have, and what to do with rows whose columns are of another kind."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

PROMPT_AND_COMPLETION = "HintCollator(tokenizer, []) reads prompt and completion"

# What data sets are made of, and how such rows become those of this package; the first that fits
KINDS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset(("chosen", "rejected")),
        "rows of preferences have two completions, and distillation takes one: make it the column "
        "'completion', and its prompt the column 'prompt', for a HintCollator(tokenizer, [])",
    ),
    (frozenset(("prompt", "completion")), f"{PROMPT_AND_COMPLETION}: give it as data_collator"),
    (
        frozenset(("messages",)),
        "split each dialogue into a prompt and a completion, such as messages[:-1] and "
        f"messages[-1:]: {PROMPT_AND_COMPLETION}",
    ),
    (
        frozenset(("conversations",)),
        "rename 'from' and 'value' of the messages to 'role' and 'content' if they have them, and "
        "split each dialogue into a prompt and a completion, such as its messages [:-1] and [-1:]: "
        f"{PROMPT_AND_COMPLETION}",
    ),
    (
        frozenset(("text",)),
        "tokenise the text into input_ids, for a data collator that adds labels such as "
        "DataCollatorForLanguageModeling(tokenizer, mlm=False), or split it into a prompt and a "
        f"completion: {PROMPT_AND_COMPLETION}",
    ),
    (
        frozenset(("prompt",)),
        "an OPSDTrainer samples completions of prompts from the student; a DistillTrainer needs "
        "the column 'completion' too, for a HintCollator(tokenizer, []), or another that "
        "completion_column names",
    ),
)

# The same for prompts whose completions are sampled
FRONT = "make the messages in front of a reply the column 'prompt', such as messages[:-1]"
SAMPLED: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset(("chosen", "rejected")), "make what both of them begin with the column 'prompt'"),
    (frozenset(("messages",)), FRONT),
    (
        frozenset(("conversations",)),
        "rename 'from' and 'value' of the messages to 'role' and 'content' if they have them, and "
        + FRONT,
    ),
    (frozenset(("text",)), "make the beginning of the text the column 'prompt'"),
)
NO_COMPLETION = "; completions are sampled, so none is needed"
HINT = (
    "; a teacher that is the student itself reads a hint too, such as a column 'hint' (of the "
    "answer, say) with HintCollator(tokenizer)"
)

OTHER_NAMES = {  # of columns in other data sets, by the argument that takes them
    "prompt_column": ("question", "instruction", "query", "problem", "input"),
    "completion_column": ("response", "answer", "output", "target", "solution"),
}

KNOWN = sorted(frozenset.union(*(needed for needed, _ in KINDS)))


def advice(columns: Iterable[str], sampled: bool = False, hinted: bool = False) -> str:
    """Say what to do with rows of these columns, or nearly these; empty if none is known.

    Args:
        columns: of the rows.
        sampled: whether completions are sampled, and not the data's.
        hinted: whether hints are read.
    """
    meant = {name for column in columns for name in get_close_matches(column, KNOWN, 1, 0.8)}
    kinds = SAMPLED if sampled else KINDS
    found = next((text for needed, text in kinds if needed <= meant), "")
    return found and f": {found}{NO_COMPLETION * sampled}{HINT * hinted}"


def missing_column(
    row: Mapping[str, Any], column: str, argument: str, sampled: bool = False, hinted: bool = False
) -> str:
    """Return the error of a row without a column, or with None in it.

    Args:
        row: of the data.
        column: the one that is needed.
        argument: of the collator, that says which column it is.
        sampled: as in `advice`.
        hinted: as in `advice`.
    """
    if not row:
        return (
            f"there is no {column!r}; the row has [] (remove_unused_columns=False keeps the data's "
            "columns)"
        )
    text = f"there is no {column!r}; the row has {sorted(row)}"
    if column in row:
        text = f"{column!r} is None, it must be a string or a list of messages"
    near = [*get_close_matches(column, row), *OTHER_NAMES[argument]]
    close = [name for name in near if row.get(name) is not None]
    if close:
        return f"{text}: if it is {close[0]!r}, set {argument}={close[0]!r}"
    fits = {name for name in row if row[name] is not None} - {"prompt", "completion"}
    return text + advice(fits, sampled, hinted)


def warning_of_begun(column: str) -> str:
    """Return what to tell where a column's prompts end in an assistant's message."""
    return (
        f"prompts of the column {column!r} end in an assistant's message, which is continued: if "
        "they are whole dialogues, give what is in front of the last reply, such as messages[:-1], "
        "as the prompt"
    )


def missing_hint(row: Mapping[str, Any], column: str, of_template: bool = False) -> str:
    """Return the error of a row without a column that a hint needs."""
    close = get_close_matches(column, row)
    told = f": if it is {close[0]!r}, name that" if close else ""
    told += " (braces that are text are written {{ and }})" if of_template else ""
    return (
        f"the hint needs column {column!r}, the row has {sorted(row)}{told}; HintCollator("
        "tokenizer, []) has no hints, for a teacher that is another model"
    )


def may_mean(row: Mapping[str, Any], column: str) -> bool:
    """Return whether the row has a column of this name, or nearly this."""
    return column in row or bool(get_close_matches(column, row))


def check_content(value: Any, column: str) -> None:
    """Check that a prompt or a completion is a string, or a list of chat messages.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return
    is_list = isinstance(value, Sequence) and not isinstance(value, bytes)
    if not is_list or not all(isinstance(x, Mapping) and "role" in x for x in value):
        raise ValueError(
            f"{column!r} must be a string, or a list of messages such as "
            f"{{'role': 'user', 'content': 'Hello'}}, got {str(value)[:80]!r}"
        )


def columns_of(dataset: Any) -> list[str] | None:
    """Return the columns of a data set's rows, without making one; None if they are not known."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        how = getattr(dataset, "format", None)
        is_made = isinstance(how, Mapping) and how.get("type") == "custom"  # set_transform
        return None if is_made else list(names)
    if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
        return list(dataset[0])
    return None


def reads_all_columns(collator: Any) -> bool:
    """Return whether a collator, or one inside it, may read any column: hints do."""
    while collator is not None:
        if getattr(collator, "reads_all_columns", False):
            return True
        collator = getattr(collator, "collator", None)
    return False
