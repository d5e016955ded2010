"""The errors of a first try say which rule is broken, by what, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from hf_distill import DistillConfig, DistillTrainer, Hint, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.losses import as_loss
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

ROW = {"prompt": "What is 1 + 2 ?", "hint": "Hint : 3", "completion": "The answer is 3 ."}


def collate(*rows: dict[str, Any]) -> Any:
    return HintCollator(models.tokenizer(), [])(rows)


def distill(folder: Path, **given: Any) -> DistillTrainer:
    settings = {"max_steps": 1, **given.pop("settings", {})}
    model, rows = given.pop("model", None) or models.llama(), given.pop("rows", models.rows())
    args, collator = (
        DistillConfig(**models.options(folder, **settings)),
        given.pop("collator", None),
    )
    teacher = given.pop("teacher", None) or models.llama(1)
    return DistillTrainer(model, args, collator or models.Pad(), rows, teacher=teacher, **given)


def opsd(folder: Path, **given: Any) -> OPSDTrainer:
    args = OPSDConfig(**models.options(folder, **given.pop("settings", {})))
    return OPSDTrainer(models.llama(), args, None, models.problems(), **given)


def short_labels(rows: Any) -> dict[str, Tensor]:
    batch = models.Pad()(rows)
    return batch | {"labels": batch["labels"][:, 1:]}


def frozen_adapters(folder: Path) -> nn.Module:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(models.llama(), lora).save_pretrained(str(folder / "adapters"))
    return PeftModel.from_pretrained(models.llama(), folder / "adapters")


def two(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


ERRORS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no tokenizer": (opsd, ValueError, "pass processing_class=tokenizer, or a HintCollator .* got"),
    "labels of another shape": (
        lambda x: distill(x, collator=short_labels).train(),
        ValueError,
        r"labels must have the shape of input_ids, .* got \[4, \d+\] and \[4, \d+\]",
    ),
    "a completion that is None": (
        lambda _: collate(ROW | {"completion": None}),
        ValueError,
        "row 0 of the batch: 'completion' is None, it must be a string or a list of messages$",
    ),
    "a prompt that is None": (
        lambda _: collate(ROW | {"prompt": None, "question": "1 + 2"}),
        ValueError,
        "'prompt' is None, .*: if it is 'question', set prompt_column='question'",
    ),
    "no labels": (
        lambda x: distill(
            x,
            collator=DataCollatorWithPadding(models.tokenizer()),
            rows=[{"input_ids": [3, 4, 5]}] * 4,
        ).train(),
        ValueError,
        r"got none: take a data collator that adds them, such as DataCollatorForLanguageModeling\("
        r"tokenizer, mlm=False\) or HintCollator",
    ),
    "another name": (
        lambda _: collate({"prompt": "1 + 2 =", "response": "3"}),
        ValueError,
        "there is no 'completion'; .*: if it is 'response', set completion_column='response'",
    ),
    "a teacher that is not there": (
        lambda x: distill(x, teacher="gpt-two-small"),
        OSError,
        "teacher must be a folder of a model or the name of one on the Hub, got 'gpt-two-small';",
    ),
    "a kind of self-teacher as a name": (
        lambda x: distill(x, teacher="ema"),
        OSError,
        r"got 'ema'; .* the student itself is SelfTeacher\('ema'\)",
    ),
    "a word for a group": (
        lambda x: distill(x, settings={"watchdog": "off"}),
        ValueError,
        r'watchdog must be a JSON object such as \{"action": "off"\}, got \'off\'',
    ),
    "a flag for a group": (
        lambda x: distill(x, settings={"watchdog": False}),
        TypeError,
        r'watchdog must be a WatchdogConfig or a mapping such as \{"action": "off"\}, got False',
    ),
    "a flag for taid": (
        lambda x: distill(x, settings={"taid": True}),
        TypeError,
        r'taid must be a TaidConfig or a mapping such as \{"t_start": 0.4\}, got True',
    ),
    "a number for a group": (
        lambda x: distill(x, settings={"clip": 0.5}),
        TypeError,
        r'clip must be a ClipConfig or a mapping such as \{"bound": 0.5\}, got 0.5',
    ),
    "a list of teachers": (
        lambda x: distill(x, teacher=[models.llama(1), models.llama(2)]),
        TypeError,
        r"several are a RoutedTeacher\(\{name: teacher, ...\}, .*, got a list of 2$",
    ),
    "a name for a tokenizer": (
        lambda _: HintCollator(cast_any("Qwen/Qwen2.5-0.5B")),
        TypeError,
        r"got its name 'Qwen/.*: load it with AutoTokenizer.from_pretrained\('Qwen/Q",
    ),
    "a model for a tokenizer": (
        lambda _: HintCollator(cast_any(models.llama())),
        TypeError,
        "tokenizer must be a tokenizer, got LlamaForCausalLM$",
    ),
    "an open brace": (
        lambda _: HintCollator(models.tokenizer(), "solution {hint"),
        ValueError,
        r"the hint 'solution \{hint' must be a template .*; write \{\{ and \}\} for braces that",
    ),
    "json in a template": (
        lambda _: Hint('Answer as {"a": 1}. {hint}'),
        ValueError,
        r"""the hint 'Answer as .* '"a"' is no column; write \{\{ and \}\} for braces""",
    ),
    "no column in braces": (lambda _: Hint("as {}"), ValueError, "'' is no column; write"),
    "words in braces": (
        lambda _: HintCollator(models.tokenizer(), "{a: 1} {hint}")([ROW]),
        ValueError,
        r"the hint needs column 'a', .*\(braces that are text are written \{\{ and \}\}\)",
    ),
    "no rows": (
        lambda x: distill(x, rows=[]).train(),
        ValueError,
        "train_dataset must have rows, got a list of none",
    ),
    "a frozen student": (
        lambda x: distill(x, model=models.llama().requires_grad_(False)).train(),
        ValueError,
        r"nothing of the student is trained: .* got \d+ without; set it$",
    ),
    "frozen adapters": (
        lambda x: distill(x, model=frozen_adapters(x)).train(),
        ValueError,
        r"nothing of the student is trained: .* PeftModel.from_pretrained\(..., is_trainable=True",
    ),
    "a loss of two": (
        lambda x: distill(x, loss=two),
        TypeError,
        r"f\(student_logits, teacher_logits, targets\) -> \[n\], .*, got <function two",
    ),
    "a loss of torch": (
        lambda x: distill(x, loss=nn.KLDivLoss()),
        TypeError,
        r"f\(student_logits, teacher_logits, targets\) -> \[n\], .*, got KLDivLoss\(\)",
    ),
}


def cast_any(value: Any) -> Any:
    return value


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_rule_value_and_remedy(tmp_path: Path, name: str) -> None:
    fails, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        fails(tmp_path)


def test_the_cause_of_a_missing_teacher_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gpt-two-small") as found:
        distill(tmp_path, teacher="gpt-two-small")
    assert isinstance(found.value.__cause__, OSError)


def test_what_looks_alike_is_no_error() -> None:
    """Escaped braces, formats, a module of three, and callables whose signature takes three."""
    row = ROW | {"two words": 7.0}
    assert Hint("{{{hint}}} {two words:.1f}").render(row) == "{Hint : 3} 7.0"

    class Three(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
            return two(student, teacher)

    logits = torch.zeros(2, 3)
    for loss in (Three(), lambda *given: two(*given[:2]), lambda a, b, c, d=1: two(a, b)):
        assert as_loss(loss).per_token(logits, logits, torch.zeros(2)).sum() == 0  # pyright: ignore
