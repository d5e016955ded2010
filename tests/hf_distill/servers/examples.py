"""Runs an example of the docs in an engine's venv, and compares it with Transformers.

python -m tests.hf_distill.servers.examples TITLE MODEL [GGUF]

Prints one JSON object: what the example's source says of rows, against what the model says.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_distill import CachedTeacher
from tests.hf_distill.servers import texts, venvs

PAGE = venvs.ROOT / "docs" / "pages" / "caches.md"
NAME = Path("HuggingFaceTB", "SmolLM2-135M-Instruct")  # what the examples call the model


def block(title: str) -> str:
    """The block of the page, behind as many empty lines as are before it there."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf'^```python title="{title}"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return "\n" * text[: found.start(1)].count("\n") + found[1]


@torch.no_grad()
def log_probs(model: Any, ids: list[int]) -> Tensor:
    """[positions 1 to the end, vocab]"""
    return model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def compare(source: Any, model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Differences of the entries and, over them, the divergence; and to another position's."""
    apart, divergence, elsewhere, order = [], [], [], []
    for ids in rows:
        want, said = log_probs(model, ids), source.top_log_probs(ids)
        assert len(said) == len(ids) - 1
        best = torch.tensor([list(entries) for entries in said])
        values = torch.tensor([list(entries.values()) for entries in said])
        assert best.shape[1] == source.top_k
        assert bool((values.diff(dim=-1) <= 0).all())
        there = want.gather(-1, best)
        apart.append((values - there).abs().max())
        divergence.append((values.exp() * (values - there)).sum(-1))
        elsewhere.append((values.exp() * (values - want.roll(1, 0).gather(-1, best))).sum(-1))
        order.append(best[:, 0] == want.argmax(-1))
    return {
        "tokens": sum(map(len, order)),
        "apart": float(max(apart)),
        "divergence": float(torch.cat(divergence).mean()),
        "elsewhere": float(torch.cat(elsewhere).mean()),
        "best": float(torch.cat(order).float().mean()),
    }


def cached(path: str, names: dict[str, Any]) -> float:
    """The largest difference of what the example has cached and of what its source says now."""
    collator, dataset = names["HintCollator"](names["tokenizer"], []), names["dataset"]
    inputs = collator(dataset)
    columns = CachedTeacher(path).columns(inputs)
    found = []
    for number, (ids, mask, labels) in enumerate(
        zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True)
    ):
        row = ids[mask.bool()].tolist()
        scored = (labels[mask.bool()] != -100).nonzero()[:, 0].tolist()
        said = names["source"].top_log_probs(row)
        for at, position in enumerate(scored):
            want = torch.tensor(list(said[position - 1].values()))
            found.append((columns["log_probs"][number, at] - want).abs().max())
    assert len(found) > len(dataset)
    return float(max(found))


def main() -> None:
    title, model, *gguf = sys.argv[1:]
    NAME.parent.mkdir()
    NAME.symlink_to(model)
    for path in map(Path, gguf):
        Path(path.name).symlink_to(path)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block(title), str(PAGE), "exec"), names)
    rows = [row["input_ids"] for row in texts.rows(Path(model)) if len(row["input_ids"]) < 64]
    real = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = compare(names["source"], real, rows)
    if "with_rope_theta" in names:
        as_saved = names["MLXLogProbs"](NAME, names["source"].top_k)
        found["as_saved"] = compare(as_saved, real, rows)
    (path,) = Path().glob("cache-*")
    print(json.dumps(found | {"cached": cached(str(path), names)}))


if __name__ == "__main__":
    main()
