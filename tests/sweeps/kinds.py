"""Tries every masked-LM, token-classifier and seq2seq type: python -m tests.sweeps.kinds.

For each type that the installed Transformers has, a tiny random model in float64 on the CPU (in
float32 where it does not run in that):

- step: loss and gradients of a DistillTrainer's first step (rows padded on the right, alpha 0.6,
  temperature 2, forward KL) are those of rows alone from `model(**inputs, labels=labels).logits`;
  of a model whose logits depend on padding, those of the padded batch.
- layers: `hidden_layers="uniform"` runs.

A cell is right, or a clear error (a ValueError of the project that names what it is about), or
wrong. Nothing may be wrong: then the command ends with status 1.
"""

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    DataCollatorForSeq2Seq,
)
from transformers.models.auto import modeling_auto as auto

from hf_distill import DistillConfig, DistillTrainer
from tests.sweeps import page, reference, running, sweep, tiny_configs
from tests.sweeps.cells import (
    GRADIENT,
    LOSS,
    NONE,
    RIGHT,
    Cell,
    as_json,
    furthest,
    measured,
    relative,
    tried,
    worst,
)
from tests.sweeps.difficult import CHANGES
from tests.tiny_models import words

KINDS: Mapping[str, tuple[Any, Any]] = {
    "masked": (AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "token classes": (
        AutoModelForTokenClassification,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "seq2seq": (AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
SETTINGS = {"temperature": reference.TEMPERATURE, "alpha": reference.ALPHA}


def names() -> list[str]:
    """Each type with its kind."""
    return [f"{type_} on {kind}" for kind, (_, found) in KINDS.items() for type_ in sorted(found)]


def model(name: str, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model of a type, as the kind has it."""
    type_, _, kind = name.partition(" on ")
    made = CONFIG_MAPPING[type_]
    changes = dict(CHANGES.get(type_, {}))
    if hasattr(made(), "is_decoder"):
        changes["is_decoder"] = False
    if kind == "seq2seq":
        changes["decoder_start_token_id"] = 0
    if kind == "token classes":
        changes["num_labels"] = 5
    torch.manual_seed(seed)
    config = tiny_configs.small_config(made, changes)
    for chance in (
        "classifier_dropout",
        "hidden_dropout",
    ):  # read also where no config has it
        setattr(config, chance, 0.0)
    return tiny_configs.spread(KINDS[kind][0].from_config(config).to(dtype))


def rows(kind: str) -> list[dict[str, list[int]]]:
    """The sweep's rows, with labels of the kind."""
    found = []
    for row in reference.rows():
        labels = row["labels"]
        if kind == "token classes":
            labels = [x if x < 0 else x % 5 for x in labels]
        if kind == "seq2seq":
            labels = [*reversed(row["input_ids"][3:]), 2]
        found.append(row | {"labels": labels})
    return found


def logits(lm: nn.Module, kind: str, together: bool) -> Tensor:
    """[N, V] float64 logits of the labelled positions, of each row alone or of the padded batch."""
    found = []
    batches = [rows(kind)] if together else [[row] for row in rows(kind)]
    for batch in batches:
        inputs = collator(lm, kind)(batch)
        if reference.takes(lm, "use_cache"):
            inputs["use_cache"] = False
        said = lm(**inputs).logits
        found.append(said[inputs["labels"] != reference.IGNORE].double())
    return torch.cat(found)


def collator(lm: nn.Module, kind: str) -> Any:
    """Pads inputs and labels on the right."""
    if kind != "seq2seq":
        return reference.Pad(lm)
    pad = DataCollatorForSeq2Seq(words())
    return lambda batch: dict(pad([dict(row) for row in batch]))


@torch.no_grad()
def reads_padding(lm: nn.Module, kind: str) -> bool:
    """Whether a model's logits depend on how far its rows are padded."""
    one, other = (logits(lm.eval(), kind, together) for together in (False, True))
    return float((one - other).abs().max()) > 1e-3 * float(one.abs().max())


def expected(student: nn.Module, teacher: nn.Module, kind: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of the rows and its gradients."""
    together = reads_padding(student, kind)
    student.train().zero_grad()
    own = logits(student, kind, together)
    with torch.no_grad():
        p = logits(teacher, kind, together) / reference.TEMPERATURE
    labels = torch.tensor([x for row in rows(kind) for x in row["labels"] if x >= 0])
    log_q, log_p = (own / reference.TEMPERATURE).log_softmax(-1), p.log_softmax(-1)
    soft = reference.TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = reference.ALPHA * soft + (1 - reference.ALPHA) * F.cross_entropy(own, labels)
    loss.backward()
    return float(loss), reference.gradients(student)


def distill(student: Any, teacher: Any, kind: str, **changes: Any) -> running.First:
    """One step of a DistillTrainer on the rows."""
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(**running.options(folder, **SETTINGS | changes))
        pad = collator(student, kind)
        trainer = DistillTrainer(student, args, pad, rows(kind), teacher=teacher)
        return running.train(trainer)


def step(name: str, student: Any, teacher: Any) -> Cell:
    """Loss and gradients of a first step."""
    kind = name.partition(" on ")[2]
    loss, gradients = expected(running.copied(student), teacher, kind)
    first = distill(running.copied(student), running.copied(teacher), kind)
    gradients = {name: x for name, x in gradients.items() if x.numel()}
    mine = {name: x for name, x in first.gradients.items() if x.numel()}
    if not all(bool(x.isfinite().all()) for x in gradients.values()):
        return Cell(NONE, "Transformers: the model's own loss has gradients that are not numbers")
    off = relative(float("nan") if first.loss is None else first.loss, loss)
    far = furthest(mine, gradients)
    text = f"{off:.0e} / {far:.0e}"
    return worst(measured(off, LOSS, text), measured(far, GRADIENT, text))


def layers(name: str, student: Any, teacher: Any) -> Cell:
    """A step with hidden layers."""
    kind = name.partition(" on ")[2]
    distill(running.copied(student), running.copied(teacher), kind, hidden_layers="uniform")
    return Cell(RIGHT)


def trial(name: str) -> dict[str, Any]:
    """All cells of a type, see `architecture_trials.trial`."""
    kind = name.partition(" on ")[2]
    for dtype in (torch.float64, torch.float32):
        try:
            student, teacher = (model(name, seed, dtype) for seed in (0, 1))
            (loss, _), (again, _) = (
                expected(running.copied(student), teacher, kind) for _ in range(2)
            )
            break
        except Exception as error:  # the library's own: there is nothing to try
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        return {"kind": name, "failed": text}
    if loss != again:
        return {"kind": name, "failed": "its forward draws numbers in training"}
    cells, path = {}, ""
    for column, tries in (("step", step), ("layers", layers)):
        with running.heard() as said:
            once = partial(tries, name, student, teacher)
            cells[column] = tried(once, (type(student).__name__,))
        path = path or running.path_of(said)
    note = "reads padding" if reads_padding(student, kind) else ""
    made = {"kind": name, "class": type(student).__name__, "path": path, "note": note}
    return made | {"cells": as_json(cells)}


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", help="'TYPE on KIND' to try, by default all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are written")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page of docs with the table")
    options = parser.parse_args()
    results = sweep.run(trial, options.names or names(), options.jobs, options.json)
    print(sweep.summary(results))
    if options.write is not None:
        page.write(options.write, "kinds", results)
    return int(sweep.any_wrong(results))


if __name__ == "__main__":
    raise SystemExit(main())
