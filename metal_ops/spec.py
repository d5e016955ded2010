"""DivergenceSpec: one frozen value that names a loss completely."""

import math
from dataclasses import dataclass, replace

KINDS = ("forward_kl", "reverse_kl", "jsd")
TEMPERATURE_SCALINGS = ("none", "t2")
CLIP_LEVELS = ("vocab_entry", "token", "token_rescale")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


@dataclass(frozen=True)
class DivergenceSpec:
    """A divergence between teacher p and student q, both softmax(logits / temperature).

    Args:
        kind: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher), "jsd"
            is beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta p + (1 - beta) q.
        beta: weight of the teacher in the JSD's mixture, in [0, 1]; other kinds ignore it. At the
            ends the mixture is one of the sides and the JSD is zero; as in GKD, "jsd" then means
            forward KL (beta 0) or reverse KL (beta 1).
        temperature: > 0, applied to both sides.
        temperature_scaling: "t2" multiplies the divergence by temperature², which keeps the size
            of the gradients (Hinton et al. 2015, section 2); "none" leaves it.
        clip: None, or a bound > 0 in nats, applied before the temperature scaling.
        clip_level: what `clip` bounds. "vocab_entry" cuts every vocabulary entry of the sum, as
            the OPSD release does; a clipped token's gradient can then point away from the teacher.
            "token" cuts the token's sum, whose gradient is then zero. "token_rescale" also bounds
            the token's value, by scaling the token by min(1, clip / value) with the factor held
            constant in the gradient, which keeps its direction.

    Raises:
        ValueError: a field is outside its range; the message gives the rule and the value.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    temperature_scaling: str = "none"
    clip: float | None = None
    clip_level: str = "vocab_entry"

    def __post_init__(self) -> None:
        """Check every field, so that a spec that exists is a valid one."""
        _check_choice("kind", self.kind, KINDS)
        _check_choice("temperature_scaling", self.temperature_scaling, TEMPERATURE_SCALINGS)
        _check_choice("clip_level", self.clip_level, CLIP_LEVELS)
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip must be positive or None, got {self.clip}")

    @property
    def scale(self) -> float:
        """What the divergence is multiplied by: temperature² under "t2", else 1."""
        return self.temperature**2 if self.temperature_scaling == "t2" else 1.0

    def resolved(self) -> "DivergenceSpec":
        """The same loss with a JSD at an end of beta's range named as the KL it stands for."""
        if self.kind != "jsd" or self.beta not in (0.0, 1.0):
            return self
        return replace(self, kind="forward_kl" if self.beta == 0.0 else "reverse_kl")
