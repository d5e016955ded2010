"""Write the table of plans on the page of engines: `python -m tests.docs.plans`.

The models are Llama 3's sizes, from their published hyperparameters.
"""

import re

from transformers import LlamaConfig

from hf_distill.monitoring.memory_plan import ENGINES, Planner, first_that_fits, plan_all
from hf_distill.monitoring.plan_command import GIB, SHARE
from hf_distill.monitoring.plan_settings import PlanSettings
from tests.docs.fields import ROOT

PAGE = ROOT / "docs" / "pages" / "engines.md"
BLOCK = re.compile(r"(<!-- plans -->\n).*?(?=<!-- end of plans -->)", re.DOTALL)
MEMORY = 80  # GiB
# width, width inside the MLP, layers, heads, whether the head is tied; all have 8 key-value heads
SIZES = {
    "1B": (2048, 8192, 16, 32, True),
    "3B": (3072, 8192, 28, 24, True),
    "8B": (4096, 14336, 32, 32, False),
    "70B": (8192, 28672, 80, 64, False),
}
SHARED = {"bf16": True, "length": 4096, "gradient_checkpointing": True}
# devices, student, teacher or None for the student before training, rank of adapters
ROWS = [
    (1, "1B", "8B", None),
    (1, "8B", None, 16),
    (8, "1B", "8B", None),
    (8, "3B", "8B", None),
    (8, "8B", "8B", None),
    (8, "1B", "70B", None),
    (8, "8B", "70B", None),
    (8, "70B", None, 16),
    (8, "70B", "70B", None),
    (32, "70B", "70B", None),
]


def config_of(size: str) -> LlamaConfig:
    width, inside, layers, heads, tied = SIZES[size]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inside,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def line(devices: int, student: str, teacher: str | None, rank: int | None) -> str:
    given = {} if rank is None else {"lora_rank": rank, "dtype": "bfloat16"}
    other = None if teacher is None else config_of(teacher)
    kind = "base" if teacher is None else "model"
    settings = PlanSettings(devices=devices, teacher=kind, **SHARED | given)
    plans, _ = plan_all(Planner(config_of(student), other, settings))
    found = {plan.engine: f"{plan.needs / GIB:.0f}" for plan in plans}
    fits = first_that_fits(plans, int(MEMORY * GIB * SHARE))
    whose = f"{student}, LoRA" if rank else student
    cells = [str(devices), whose, teacher or "itself", *(found.get(x, "") for x in ENGINES)]
    return "| " + " | ".join([*cells, "none" if fits is None else f"`{fits.engine}`"]) + " |"


def table() -> str:
    header = ["devices", "student", "teacher", *(f"`{x}`" for x in ENGINES), "the first to fit"]
    bars = ["---:", "---", "---", *["---:"] * len(ENGINES), "---"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, bars)]
    return "\n".join([*lines, *(line(*row) for row in ROWS)]) + "\n"


def written(text: str) -> str:
    """The page with the table as it must be."""
    return BLOCK.sub(lambda found: found[1] + table(), text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
