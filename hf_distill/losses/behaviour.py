"""What the student says of the tokens that it has sampled, for steps that use them again."""

import torch
from torch import Tensor, nn

from hf_distill.data import sides
from hf_distill.losses import chunks
from hf_distill.models.forward import Reader
from hf_distill.models.modes import evaluating
from hf_distill.models.structure import unwrap


@torch.no_grad()
def behaviour_log_probs(reader: Reader, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return log-probabilities of a batch's scored tokens under the student as it is now.

    It serves completions that are used for several optimizer steps. It is called once behind the
    rollout, on the batch as it will be trained on (the same rows, padded alike), and its result
    goes into the batch as `behaviour_log_probs`.

    Args:
        reader: of the student.
        model: the student, wrapped or not; it is read in eval mode and is then as before.
        batch: with labels [B, T].

    Returns:
        [B, T] float32 (float64 for float64 models), aligned with the labels: at each scored token
        its log-probability at temperature 1 in nats; NaN elsewhere.
    """
    side = sides.student_side(batch)
    targets = sides.targets(batch["labels"], side.predicts)
    model = unwrap(model)
    with evaluating(model):
        found = reader.run(model, side, lambda student: chunks.log_probs(student, targets))
    result = torch.full(side.predicts.shape, torch.nan, dtype=found.dtype, device=found.device)
    rows, columns = sides.places(side.predicts)
    result[rows, columns + 1] = found
    return result
