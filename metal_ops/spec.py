"""Defines DivergenceSpec, one frozen value that names a loss completely."""

import ast
import functools
import math
from dataclasses import dataclass, field, replace

KINDS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "soft_ce",
    "tvd",
    "skew_kl",
    "skew_reverse_kl",
    "mixed_kl",
    "alpha",
)
TEMPERATURE_SCALINGS = ("none", "t2")
SUPPORTS = ("full", "teacher_topk", "student_topk", "union")
MISSING = ("tail", "renormalise", "zero")
CLIP_LEVELS = ("vocab_entry", "token", "token_rescale")

# a kind at an end of beta's range that is (jsd: by convention stands for) one of the KLs
ENDS = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skew_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
    ("mixed_kl", 0.0): "reverse_kl",
    ("mixed_kl", 1.0): "forward_kl",
    ("alpha", 0.0): "reverse_kl",
    ("alpha", 1.0): "forward_kl",
}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


@dataclass(frozen=True)
class DivergenceSpec:
    """Names a divergence between teacher p and student q, both softmax(logits / temperature).

    Args:
        kind: with a = beta,
            "forward_kl": KL(p || q), teacher first.
            "reverse_kl": KL(q || p), student first.
            "jsd": a KL(p || m) + (1 - a) KL(q || m), m = a p + (1 - a) q.
            "soft_ce": -sum p log q, the forward KL plus the teacher's entropy.
            "tvd": sum |p - q| / 2.
            "skew_kl": KL(p || a p + (1 - a) q).
            "skew_reverse_kl": KL(q || (1 - a) p + a q).
            "mixed_kl": a KL(p || q) + (1 - a) KL(q || p).
            "alpha": Amari's alpha divergence, (1 - sum p^a q^(1-a)) / (a (1 - a)).
        beta: the a above, in [0, 1]. The kinds without an a ignore it. At 0 and 1 the JSD itself is
            zero. As in GKD, "jsd" then means forward KL (0) or reverse KL (1). "alpha" tends to the
            reverse KL at 0 and to the forward KL at 1. The skewed kinds need beta < 1.
        temperature: the temperature that is applied to both sides, greater than 0.
        temperature_scaling: "t2" multiplies the divergence by temperature², which keeps the size
            of the gradients (Hinton et al. 2015, section 2); "none" leaves it.
        support: the vocabulary entries that count: "full", or the top_k of the teacher
            ("teacher_topk"), of the student ("student_topk") or of either ("union"). The choice of
            the entries has no gradient.
        top_k: the number of entries of a support, at least 1. None for "full".
        missing: says what happens to the entries outside the support. "tail" keeps their mass as
            one more category, whose optimum is p = q. "renormalise" divides both sides by their
            mass on the support. "zero" drops the terms. A sparse teacher uses it whatever the
            support.
        clip: a bound in nats, greater than 0, which is applied before the temperature scaling. None
            means that nothing is clipped.
        clip_level: says what `clip` bounds. "vocab_entry" cuts every entry of the sum, as the OPSD
            release does. A clipped token's gradient can then point away from the teacher. "token"
            cuts the token's sum, whose gradient is then zero. "token_rescale" also bounds the
            token's value, by scaling the token by min(1, clip / value) with the factor held
            constant in the gradient, which keeps its direction.

    Attributes:
        scale: derived, no argument; what the divergence is multiplied by, temperature² under "t2",
            else 1.
        resolved_text: derived, no argument; `resolved().to_text()`, which the ops are given.

    Raises:
        ValueError: a field is outside its range, or two exclude each other; the message gives the
            rule and the value.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    temperature_scaling: str = "none"
    clip: float | None = None
    clip_level: str = "vocab_entry"
    support: str = "full"
    top_k: int | None = None
    missing: str = "tail"
    scale: float = field(init=False, repr=False, compare=False)
    # made here: torch.compile sees a constant, where it would make numbers symbolic
    resolved_text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field, so that a spec that exists is a valid one."""
        _check_choice("kind", self.kind, KINDS)
        _check_choice("temperature_scaling", self.temperature_scaling, TEMPERATURE_SCALINGS)
        _check_choice("clip_level", self.clip_level, CLIP_LEVELS)
        _check_choice("support", self.support, SUPPORTS)
        _check_choice("missing", self.missing, MISSING)
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if self.kind.startswith("skew") and self.beta == 1.0:
            raise ValueError(
                f"beta of {self.kind} must be below 1, where it is zero for every student, "
                f"got {self.beta}"
            )
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.clip is not None and not (self.clip > 0.0 and math.isfinite(self.clip)):
            raise ValueError(f"clip must be positive and finite, or None, got {self.clip}")
        self._check_support()
        scale = self.temperature**2 if self.temperature_scaling == "t2" else 1.0
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "resolved_text", self.resolved().to_text())

    def _check_support(self) -> None:
        if self.support == "full":
            if self.top_k is not None:
                raise ValueError(f"top_k must be None with support 'full', got {self.top_k}")
        elif self.top_k is None or self.top_k < 1:
            raise ValueError(f"support {self.support!r} needs top_k >= 1, got {self.top_k}")
        kind = self.resolved().kind
        if self.missing == "zero" and kind in ("reverse_kl", "skew_reverse_kl", "mixed_kl"):
            raise ValueError(
                f"missing 'zero' must not be used with {kind}: without the rest of the vocabulary "
                "a reverse KL is smallest not at q = p but at q = p / e, so the student learns "
                "to move mass off the support; use missing 'tail' or 'renormalise'"
            )

    def resolved(self) -> "DivergenceSpec":
        """Return the same loss, with a kind at an end of beta's range as the KL it stands for."""
        kind = ENDS.get((self.kind, self.beta))
        return self if kind is None else replace(self, kind=kind)

    def to_text(self) -> str:
        """Write the spec as a Python tuple: an op's schema knows numbers and strings only."""
        return (
            f"({self.kind!r}, {self.beta!r}, {self.temperature!r}, {self.temperature_scaling!r}, "
            f"{self.clip!r}, {self.clip_level!r}, {self.support!r}, {self.top_k!r}, "
            f"{self.missing!r})"
        )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_text(text: str) -> "DivergenceSpec":
        """Read what `to_text` wrote."""
        return DivergenceSpec(*ast.literal_eval(text))
