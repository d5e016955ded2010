"""What a step has measured of its scored tokens, row by row, for a table of completions."""

from typing import Any, cast

from torch import Tensor

from hf_distill.data import sides
from hf_distill.losses import Terms, Tokens
from hf_distill.monitoring.completion_table import CompletionTable
from hf_distill.trainers.tasks import Batch

LOSS, WEIGHT = "loss", "weight"
_NAMES = {"soft": LOSS}  # in the file, where it is another than in the logs


def write_values(
    table: CompletionTable,
    step: int,
    terms: Terms,
    batch: Batch,
    tokens: Tokens,
    num_rows: int,
) -> None:
    """Add the scored tokens of the first rows of a micro-batch to a table.

    Args:
        table: of the run.
        step: optimizer steps taken before it.
        terms: of the batch, with [N] values by name.
        batch: as the task has read it.
        tokens: with their weights [N], of which the means over the optimizer step are taken out.
        num_rows: how many rows of the batch, >= 1.
    """
    counts = (batch.inputs["labels"][:, 1:] != sides.IGNORE_INDEX).sum(1).tolist()
    share = tokens.weights * cast(Any, batch.num_items) / batch.num_averaged
    found = {_NAMES.get(name, name): value for name, value in terms.metrics.items()}
    found |= dict(batch.logged or {}) | {WEIGHT: share}

    def of_rows(values: Tensor) -> list[list[float]]:
        return [x.tolist() for x in values.detach().float().cpu().split(counts)[:num_rows]]

    ids = [x.tolist() for x in tokens.targets.cpu().split(counts)[:num_rows]]
    values = {name: of_rows(x) for name, x in found.items() if len(x) == sum(counts)}
    table.add_values(step, ids, values)
