"""How much a scored token counts by where it stands among those of its row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.data.sides import IGNORE_INDEX

POSITIONS = ("none", "early", "late")


@dataclass(frozen=True)
class PositionWeights:
    """Computes weights from the places of tokens alone.

    With u = (i - 0.5) / n, where the token is the i-th (from 1) of the n scored ones of its row,

        late:  floor + (1 - floor) * sigmoid((u - middle) / width)
        early: floor + (1 - floor) * sigmoid((middle - u) / width)

    and 0 for the first `skip_first` tokens of the row, which still count in i and n.

    Args:
        kind: one of `POSITIONS`.
        floor: what the weights go down to, in [0, 1].
        middle: the u halfway between floor and 1, in [0, 1].
        width: how softly they change there, > 0.
        skip_first: tokens of each row that have no weight.

    Source:
        "late" is the position weight of PW-OPSD (arXiv:2605.21606), whose release computes u in the
        same way and has the defaults 0.25, 0.3 and 0.1. It then takes the mean over rows of each
        row's mean; here a step's loss is one weighted mean over its tokens. "early" is its mirror
        image, by the finding of IW-OPD (arXiv:2606.22600) that the first 30 % of a completion teach
        as much as all of it. IW-OPD's own rule, which measures how far the two sides have
        drifted apart, is `losses.drift`.
    """

    kind: str = "none"
    floor: float = 0.25
    middle: float = 0.3
    width: float = 0.1
    skip_first: int = 0

    @property
    def active(self) -> bool:
        """Return whether some tokens count more than others."""
        return self.kind != "none" or self.skip_first > 0

    def __call__(self, labels: Tensor) -> Tensor:
        """Return [B, T] float32 factors aligned with the labels [B, T], 0 where nothing is scored.

        Nothing predicts the first token of a row, so a label there is not scored.
        """
        scored = labels != IGNORE_INDEX
        scored[:, 0] = False
        count = scored.cumsum(1)
        factor = scored.float()
        if self.kind != "none":
            place = (count - 0.5) / count[:, -1:].clamp_min(1)
            ahead = place - self.middle if self.kind == "late" else self.middle - place
            factor = factor * (self.floor + (1 - self.floor) * torch.sigmoid(ahead / self.width))
        return torch.where(count > self.skip_first, factor, 0.0)
