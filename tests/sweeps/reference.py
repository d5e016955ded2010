"""Rows, and what is right for them: each alone, unpadded, from `model(**inputs).logits`."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, BOS, IGNORE = 0, 1, -100
FILLS = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORE}
TEMPERATURE, ALPHA = 2.0, 0.6


def rows() -> list[dict[str, list[int]]]:
    """Rows of 13, 9 and 6 tokens, all begun alike; 3, 2 and 1 labels are ignored."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length, ignored in ((13, 3), (9, 2), (6, 1)):
        ids = [BOS, *torch.randint(5, 60, (length - 1,), generator=generator).tolist()]
        labels = [IGNORE] * ignored + ids[ignored:]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model, or of the model in its adapters, names an argument."""
    get_base_model = getattr(model, "get_base_model", None)
    lm = model if get_base_model is None else get_base_model()
    return name in inspect.signature(lm.forward).parameters


def tasks(model: nn.Module, count: int) -> dict[str, Tensor]:
    """A task for each row, where an adapter tells tasks apart."""
    configs = getattr(model, "peft_config", {}).values()
    several = any(hasattr(x, "n_tasks") or hasattr(x, "num_tasks") for x in configs)
    return {"task_ids": torch.zeros(count, dtype=torch.long)} if several else {}


class Pad:
    """A collator that pads on one side, with those columns that a model takes."""

    def __init__(self, model: nn.Module, side: str = "right") -> None:
        masked = takes(model, "attention_mask")
        self.names = [name for name in FILLS if masked or name != "attention_mask"]
        self.side, self.tasks = side, partial(tasks, model)

    def __call__(self, batch: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        made = {}
        for name in self.names:
            fills = [[FILLS[name]] * (width - len(row[name])) for row in batch]
            pairs = [(list(row[name]), gap) for row, gap in zip(batch, fills, strict=True)]
            joined = [a + b if self.side == "right" else b + a for a, b in pairs]
            made[name] = torch.tensor(joined)
        return made | self.tasks(len(batch))


def inputs_of(model: nn.Module, ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of a forward of one row alone."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    if takes(model, "attention_mask"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs | tasks(model, 1)


def logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """[T, V] float64 logits of one row alone, without those of an adapter's virtual tokens."""
    return model(**inputs_of(model, ids)).logits[0, -len(ids) :].double()


def logits_of_rows(model: nn.Module, together: bool = False) -> list[Tensor]:
    """Float64 logits of the sweep's rows, each alone or `together`, padded on the right."""
    if not together:
        return [logits(model, row["input_ids"]) for row in rows()]
    batch = Pad(model)(rows())
    width = batch["input_ids"].shape[1]  # before these columns are an adapter's virtual tokens
    found = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    found = found[:, -width:].double()
    return [x[: len(row["input_ids"])] for x, row in zip(found, rows(), strict=True)]


def scored_logits(model: nn.Module, together: bool = False) -> Tensor:
    """[N, V] logits that predict the labelled tokens of the sweep's rows."""
    pairs = zip(logits_of_rows(model, together), rows(), strict=True)
    return torch.cat([x[:-1][torch.tensor(row["labels"])[1:] != IGNORE] for x, row in pairs])


def distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, together: bool = False
) -> Tensor:
    """The mean over the rows' tokens of alpha T² KL(teacher || student) + (1 - alpha) CE."""
    own = scored_logits(student, together)
    with torch.no_grad():
        other = scored_logits(teacher, together) / TEMPERATURE
    labels = torch.cat([torch.tensor(row["labels"])[1:] for row in rows()])
    p, log_p = other.softmax(-1), other.log_softmax(-1)
    soft = (p * (log_p - (own / TEMPERATURE).log_softmax(-1))).sum(-1).mean()
    hard = F.cross_entropy(own, labels[labels != IGNORE])
    return alpha * TEMPERATURE**2 * soft + (1 - alpha) * hard


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's gradients, of those parameters that have one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _added(model: nn.Module) -> Tensor:
    """What a model's own loss has beside the cross-entropy of the next tokens."""
    row = rows()[0]
    labels = torch.tensor([row["labels"]])
    out = model(**inputs_of(model, row["input_ids"]), labels=labels)
    return out.loss - F.cross_entropy(out.logits[0, :-1], labels[0, 1:])


def distillation_step(
    student: nn.Module,
    teacher: nn.Module,
    alpha: float,
    together: bool = False,
    adds_loss: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """The loss of the rows and its gradients; the student is in training mode.

    With `adds_loss`, what the student's own loss has beside the cross-entropy counts whole.
    """
    student.train().zero_grad()
    loss = distillation(student, teacher.eval(), alpha, together)
    if adds_loss:
        loss = loss + _added(student)
    loss.backward()
    return float(loss), gradients(student)


@torch.no_grad()
def divergence(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int], int]],
) -> float:
    """The mean JSD over the completions of (student's ids, teacher's ids, completion's length)."""
    total, count = 0.0, 0
    for own, other, length in pairs:
        p, q = (
            logits(model, ids)[-length - 1 : -1].softmax(-1)
            for model, ids in ((teacher, other), (student, own))
        )
        m = ((p + q) / 2).log()
        total += float((p * (p.log() - m) + q * (q.log() - m)).sum() / 2)
        count += length
    return total / count


def has_finite_gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch's own loss has gradients that are numbers; none is left."""
    cache = {"use_cache": False} if takes(model, "use_cache") else {}
    model.zero_grad()
    model(**batch, **cache).loss.backward()
    found = gradients(model)
    model.zero_grad()
    return all(bool(x.isfinite().all()) for x in found.values())


def is_random(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether a step in training mode depends on random numbers; no weight or gradient is left.

    The loss alone does not tell it: what an adapter drops out changes nothing while it is zero.
    """
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(distillation_step(student, teacher, ALPHA))
    student.eval().zero_grad()
    (loss, one), (again, other) = found
    return loss != again or any(not torch.equal(one[name], other[name]) for name in one)


def has_own_loss(model: nn.Module) -> bool:
    """Whether the loss that the model computes itself is not the next tokens' cross-entropy."""
    row = rows()[0]
    labels = torch.tensor([row["labels"]])
    with torch.no_grad():
        found = logits(model, row["input_ids"])[:-1]
        expected = float(F.cross_entropy(found, labels[0, 1:]))
        try:
            own = model(**inputs_of(model, row["input_ids"]), labels=labels).loss
        except (ValueError, RuntimeError, TypeError):
            return True  # git, say, counts an image's positions among those of the labels
    return own is None or abs(float(own) - expected) > 1e-4 * expected


@torch.no_grad()
def is_greedy(
    model: nn.Module, prompt: Sequence[int], completion: Sequence[int], tolerance: float
) -> bool:
    """Whether each token of a completion is the most probable one, or as good as that."""
    found = logits(model, [*prompt, *completion])[len(prompt) - 1 : -1]
    chosen = found.gather(-1, torch.tensor(list(completion))[:, None])[:, 0]
    gap = found.amax(-1) - chosen
    return bool((gap <= tolerance * found.abs().amax(-1)).all())
