"""What is known of a teacher of which a few entries a token are stored."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TailSamples(NamedTuple):
    """Entries drawn from a teacher's tail, the vocabulary without its known entries.

    ids [..., n] int64: what was drawn, repeats allowed; below 0 there is no draw. log_probs
    [..., n]: the teacher's log-probabilities there. log_weights [..., n]: log(1 / (draws g(s))), g
    the probability with which one draw gives s, so that the sum of exp(log_weight) f(s) over the
    draws estimates the sum of f over the tail; -inf where there is no draw.
    """

    ids: Tensor
    log_probs: Tensor
    log_weights: Tensor


class PowerSums(NamedTuple):
    """What carries the mass of a tail to other temperatures.

    orders: distinct numbers > 0 without 1, m of them. log_sums [..., m]: log of the sum over the
    tail of p^order, with p at the teacher's temperature. num_tail [...]: how many entries the tail
    has, any number dtype. temperature_range: smallest and largest temperature it serves.
    """

    orders: tuple[float, ...]
    log_sums: Tensor
    num_tail: Tensor
    temperature_range: tuple[float, float]


class SparseTeacher(NamedTuple):
    """A teacher known at a few entries a token, from a cache or a server.

    ids [..., K] int64: distinct vocabulary entries; those below 0 are padding. log_probs [..., K]:
    the teacher's log-probabilities there, not renormalised. log_tail [...]: the log of the mass it
    gives to all other entries (-inf if it gives none). temperature: at which they were taken.
    samples: draws from the other entries, or None. powers: what `at` needs, or None.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    samples: TailSamples | None = None
    powers: PowerSums | None = None

    def at(self, temperature: float) -> "SparseTeacher":
        """The same teacher at another temperature, without `powers`.

        With a = self.temperature / temperature, each probability p becomes p^a over the sum of
        p^a. The tail's part of the sum is read off its power sums: log S(a) is convex in a and
        known at 0, 1 and the orders; between them a polynomial through all of them is taken, kept
        between the bounds that convexity gives.

        Args:
            temperature: > 0.

        Returns:
            This teacher itself if it is at that temperature. The weights of samples stay as they
            are: how likely a draw was does not depend on where it is used.

        Raises:
            ValueError: there are no power sums, or they do not serve the temperature.
        """
        if temperature == self.temperature:
            return self
        if self.powers is None:
            raise ValueError(
                f"the teacher's log-probabilities are at temperature {self.temperature:g} and "
                "cannot be taken at another without power sums: set the loss's temperature to "
                f"it, got {temperature:g}"
            )
        low, high = self.powers.temperature_range
        if not low <= temperature <= high:
            raise ValueError(
                f"the teacher's power sums serve temperatures from {low:g} to {high:g}, got "
                f"{temperature:g}"
            )
        order = self.temperature / temperature
        log_tail = _log_power_sum(order, self.powers, self.log_tail)
        log_probs = (order * self.log_probs).masked_fill(self.ids < 0, -torch.inf)
        total = torch.cat([log_probs, log_tail[..., None]], dim=-1).logsumexp(-1)
        samples = self.samples
        if samples is not None:
            moved = order * samples.log_probs - total[..., None]
            samples = samples._replace(log_probs=moved.masked_fill(samples.ids < 0, -torch.inf))
        return SparseTeacher(
            self.ids, log_probs - total[..., None], log_tail - total, temperature, samples
        )


def _log_power_sum(order: float, powers: PowerSums, log_tail: Tensor) -> Tensor:
    """Log of the sum of p^order over the tail: [...], -inf where the tail is empty."""
    knots = [0.0, 1.0, *powers.orders]
    if order > max(knots):
        raise ValueError(
            f"the teacher's power sums reach up to order {max(knots):g}, but the temperature asks "
            f"for {order:g}"
        )
    known = [powers.num_tail.to(log_tail.dtype).log(), log_tail, *powers.log_sums.unbind(-1)]
    pairs = sorted(zip(knots, known, strict=True), key=lambda pair: pair[0])
    at = [knot for knot, _ in pairs]
    value = torch.stack([x for _, x in pairs], dim=-1)
    if order in at:
        return value[..., at.index(order)]
    fit = sum(
        math.prod((order - b) / (a - b) for b in at if b != a) * value[..., i]
        for i, a in enumerate(at)
    )
    return fit.masked_fill(log_tail == -torch.inf, -torch.inf)
