"""Draws from the whole distribution and nothing else."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_distill.cache.codecs.sparse import SparseCodec
from metal_ops import DivergenceSpec


@dataclass(frozen=True)
class Sampled(SparseCodec):
    """Stores draws from the whole vocabulary, which make losses unbiased and need few bytes.

    It does random sampling distillation (Anshumann et al. 2025, arXiv 2503.16870) with systematic
    draws, which scatter less, and repeated draws stored once with their number. The vocabulary is
    one tail of mass 1: a decoded teacher has no head.

    Args:
        num_samples: the number of draws per token, 1 to 255.
        temperature: the temperature at which the log-probabilities are taken.
        temperature_range: the smallest and the largest temperature of a loss.

    Raises:
        ValueError: a number is out of range.
    """

    name: ClassVar[str] = "sampled"

    num_samples: int = 50
    temperature: float = 1.0
    temperature_range: tuple[float, float] = (1.0, 1.0)
    top_k: int = field(init=False, repr=False, default=0)
    top_p: float | None = field(init=False, repr=False, default=None)
    num_exact: int = field(init=False, repr=False, default=1)
    merges_draws: bool = field(init=False, repr=False, default=True)

    def serves(self, spec: DivergenceSpec) -> str | None:
        """Return a refusal, also of a loss that the teacher's draws cannot estimate, or None."""
        kind = spec.resolved().kind
        if kind in ("reverse_kl", "skew_reverse_kl", "mixed_kl", "alpha"):
            return (
                f"{kind} needs the teacher where the student has its mass, and draws from the "
                'teacher are not there: cache with the codec "head_samples" or "full"'
            )
        if spec.missing != "tail":
            return (
                f"missing {spec.missing!r} leaves out all but the head, and draws have no head: "
                'cache with the codec "head_samples"'
            )
        if spec.clip is not None and spec.clip_level == "vocab_entry":
            return (
                "clip_level 'vocab_entry' bounds every entry, and draws know only some: use "
                "clip_level 'token', or cache with the codec \"full\""
            )
        return super().serves(spec)
