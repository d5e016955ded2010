"""A part of the sweeps that covers their kinds, and that a sweep notices what is wrong."""

import math
from collections.abc import Iterator

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import logging

from hf_distill.models.structure import check_kind
from tests.sweeps import adapter_trials, architecture_trials, cells, kinds, page, running, sweep
from tests.sweeps.cells import CLEAR, NONE, RIGHT, WRONG, Cell
from tests.sweeps.difficult import CHANGES, WINDOWS
from tests.sweeps.tiny_configs import types

# By what makes them special: learnt positions; positions from the padding's id; positions that no
# argument sets; no mask of padding in its states; segment numbers in the mask; no positions; state
# space; a softcap; latent attention and experts; M-RoPE; streams with an axis more; a router that
# samples; a loss of its own
FAMILIES = """gpt2 roberta bart rwkv bert bloom mamba gemma2 deepseek_v3 qwen3_5_text gemma3n_text
phimoe git"""
ADAPTERS = (
    "lora on llama",
    "lora on gpt2",
    "lora bias all on gpt2",
    "lora pissa on llama",
    "lora save head on llama",
    "lora merged on llama",
    "adalora on llama",
    "adaption_prompt on llama",
    "prompt_tuning on llama",
    "c3a on llama",
    "ia3 on gpt2",
    "mixed on llama",
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def none_wrong(result: sweep.Result) -> None:
    assert "cells" in result, result
    assert not sweep.any_wrong([result]), sweep.line(result)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILIES.split())
def test_a_family_is_right_or_refused(kind: str) -> None:
    none_wrong(architecture_trials.trial(kind))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mistral", "minimax_m3_vl_text"])  # windows; blocks by columns
def test_windows_smaller_than_the_rows(kind: str) -> None:
    none_wrong(architecture_trials.trial(kind, windows=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_right_or_refused(name: str) -> None:
    none_wrong(adapter_trials.trial(name))


OF = Version("5.24")  # of Transformers, whose types the tables name


def test_tables_of_single_types_name_types_that_there_are() -> None:
    unknown = (set(CHANGES) | set(WINDOWS)) - set(types())
    assert not unknown or Version(transformers.__version__) < OF


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels than the reference has."""
    rows = running.rows()
    monkeypatch.setattr(
        running, "rows", lambda: [row | {"labels": row["input_ids"]} for row in rows]
    )
    result = architecture_trials.trial("llama", columns=("step",))
    assert result["cells"]["step"][0] == WRONG
    assert sweep.any_wrong([result])


def test_only_errors_of_the_project_that_name_their_subject_are_clear() -> None:
    class BertForQuestionAnswering(torch.nn.Module):
        pass

    def own() -> Cell:
        check_kind(BertForQuestionAnswering(), "student")
        raise AssertionError

    def foreign() -> Cell:
        raise ValueError("the student must have been something else than what it is here")

    assert cells.tried(own).verdict == CLEAR
    assert cells.tried(foreign).verdict == WRONG
    assert cells.tried(foreign, plain=foreign).verdict == NONE


def test_nan_is_wrong() -> None:
    assert cells.measured(math.nan, 1.0).verdict == WRONG
    nan = {"a": torch.tensor([math.nan])}
    assert math.isnan(cells.furthest(nan, {"a": torch.ones(1)}))
    assert cells.furthest({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}) == 1.0


def result(kind: str, *verdicts: Cell) -> sweep.Result:
    found: dict[str, Cell] = dict(zip(("step", "left"), verdicts, strict=True))
    head = {"kind": kind, "class": f"{kind}LM", "path": "hidden", "note": ""}
    return head | {"cells": cells.as_json(found)}


def test_equal_rows_are_one_row_of_the_page() -> None:
    right = Cell(RIGHT, "1e-07 / 2e-07"), Cell(RIGHT, "3e-07 / 1e-07")
    other = Cell(RIGHT, "2e-07 / 1e-07"), Cell(RIGHT, "1e-07 / 1e-07")
    clear = Cell(RIGHT, "0e+00 / 0e+00"), Cell(CLEAR, "rows of aLM are 0.2 nats apart")
    also_clear = Cell(RIGHT, "0e+00 / 0e+00"), Cell(CLEAR, "rows of bLM are 1e-3 nats apart")
    made = page.section(
        [
            result("x", *right),
            result("y", *other),
            result("a", *clear),
            result("b", *also_clear),
            {"kind": "z", "failed": "ImportError: no <library>"},
        ]
    )
    assert "| 2 | x, y | hidden | right, 2e-07 / 2e-07 | right, 3e-07 / 1e-07 |" in made
    assert "| left | 2 | 2 | 0 | 0 |" in made
    assert "- left (a, b): rows of aLM are 0.2 nats apart" in made
    assert "- z: ImportError: no \\<library\\>" in made


# One whose logits depend on padding, one without a vocabulary's head, one with relative positions
@pytest.mark.parametrize("name", ["fnet on masked", "albert on token classes", "t5 on seq2seq"])
def test_other_kinds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in kinds.names()
    result = kinds.trial(name)
    assert [verdict for verdict, _ in result["cells"].values()] == [RIGHT, RIGHT]
    assert result["note"] == ("reads padding" if name.startswith("fnet") else "")
    monkeypatch.setattr(kinds.reference, "ALPHA", 0.59)  # of the reference, not of the trainer
    monkeypatch.setattr(kinds, "SETTINGS", kinds.SETTINGS | {"alpha": 0.6})
    assert kinds.trial(name)["cells"]["step"][0] == WRONG
