"""Names the losses of other libraries as specs; `preset(name)` finds them.

Each takes the arguments of its source, in the convention of its source, and gives the divergence
per token. How a library averages over tokens is named where it is not the mean over all of them.
Defaults are those of the function named, or of its trainer where it has none. A library that is no
dependency is named by the commit that was read.
"""

from collections.abc import Callable
from dataclasses import replace

from metal_ops.spec import DivergenceSpec


def opsd(beta: float = 0.5, temperature: float = 1.0, top_k: int | None = None) -> DivergenceSpec:
    """Return OPSD's generalized JSD, over the teacher's top_k (renormalised) if given.

    Source:
        `OPSDTrainer.generalized_jsd_loss`, github.com/siyan-zhao/OPSD at 590ec26. The trainer
        passes its sampling temperature, which TRL's GOLDConfig sets to 0.9.
    """
    return _top_k(DivergenceSpec("jsd", beta, temperature), top_k)


def opsd_clip(
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    token_clip: float = 0.05,
) -> DivergenceSpec:
    """Return `opsd` with each vocabulary entry of the divergence cut at token_clip nats.

    It reproduces its runs: a cut entry can turn a token's gradient away from the teacher.

    Source:
        As `opsd`, in a later release (jsd_token_clip), read in what was built on that:
        github.com/Mystic-Slice/OPSD-original at 4e23267.
    """
    return _top_k(DivergenceSpec("jsd", beta, temperature, clip=token_clip), top_k)


def trl_gkd(beta: float = 0.5, temperature: float = 1.0) -> DivergenceSpec:
    """Return the generalized JSD of TRL's GKDTrainer, which itself leaves temperature at 1 here.

    Source:
        `GKDTrainer.generalized_jsd_loss`, TRL 1.16 (trl.experimental.gkd).
    """
    return DivergenceSpec("jsd", beta, temperature)


def trl_distillation(beta: float = 1.0, temperature: float = 1.0) -> DivergenceSpec:
    """Return the generalized JSD of TRL's DistillationTrainer, by default the reverse KL.

    Source:
        `DistillationTrainer` and `ChunkedDivergenceFunction`, TRL 1.16. The temperature is also
        that of sampling.
    """
    return DivergenceSpec("jsd", beta, temperature)


def sdft(
    distillation_alpha: float = 0.5,
    distillation_topk: int | None = 100,
    distillation_add_tail: bool = False,
    temperature: float = 1.0,
) -> DivergenceSpec:
    """Return the divergence of TRL's SDFTTrainer, over the student's top-k; it averages row means.

    Source:
        `compute_topk_self_distillation_loss` and, without distillation_topk,
        `compute_full_logit_self_distillation_loss`, TRL 1.16 (trl.experimental.sdft), before its
        importance weights. There the tail is one less the kept mass, at least 1e-7; here it is
        summed.
    """
    if distillation_topk is None:
        return DivergenceSpec("jsd", distillation_alpha, temperature)
    return DivergenceSpec(
        "jsd",
        distillation_alpha,
        temperature,
        support="student_topk",
        top_k=distillation_topk,
        missing="tail" if distillation_add_tail else "renormalise",
    )


def sdpo(
    distillation_alpha: float = 1.0,
    distillation_topk: int | None = None,
    distillation_add_tail: bool = False,
    temperature: float = 1.0,
) -> DivergenceSpec:
    """Return the divergence of TRL's SDPOTrainer over logits; the mean is one of row means.

    Source:
        trl.experimental.sdpo, TRL 1.16, as `sdft`. Its default mode, the policy gradient of
        sampled tokens, is not a divergence between logits.
    """
    return sdft(distillation_alpha, distillation_topk, distillation_add_tail, temperature)


def liger_jsd(beta: float = 0.5, temperature: float = 1.0) -> DivergenceSpec:
    """Return the generalized JSD of Liger's chunked loss, by default half of a mix with labels.

    Source:
        `LigerFusedLinearJSDFunction` and its `distillation_loss_fn`, liger-kernel 0.8.5.
    """
    return DivergenceSpec("jsd", beta, temperature)


def ms_swift_gkd(
    beta: float = 0.5, temperature: float = 0.9, gkd_logits_topk: int | None = None
) -> DivergenceSpec:
    """Return ms-swift's generalized JSD (GKD), over the teacher's top-k (renormalised) if given.

    Source:
        `gkd_loss` of swift/rlhf_trainers/gkd_loss.py, github.com/modelscope/ms-swift at 3602360.
        It gets the sampling temperature, whose default is 0.9.
    """
    return _top_k(DivergenceSpec("jsd", beta, temperature), gkd_logits_topk)


def kdflow_jsd(beta: float = 0.5, temperature: float = 1.0) -> DivergenceSpec:
    """Return the JSD of KDFlow, whose beta is the weight of the student: the spec has 1 - beta.

    Raises:
        ValueError: beta is not between 0 and 1; the source has no limits there.

    Source:
        `compute_js_div` (jsd_beta) of kdflow/loss/js_div.py, github.com/songmzhang/KDFlow at
        3a7a21a.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta of kdflow_jsd must be in (0, 1), got {beta}")
    return DivergenceSpec("jsd", 1 - beta, temperature)


def nemo_mixed(
    mixed_kl_weight: float = 0.5, topk_logits_k: int | None = 64, temperature: float = 1.0
) -> DivergenceSpec:
    """Return NeMo-RL's weighted forward and reverse KL, over the teacher's top-k (renormalised).

    Source:
        `DistillationLossFn` with kl_type "mixed" and zero_outside_topk false, and
        `get_distillation_topk_logprobs_from_logits`, github.com/NVIDIA-NeMo/RL at 7ea279a. The
        logits come divided by the sampling temperature; the source has no full vocabulary.
    """
    return _top_k(DivergenceSpec("mixed_kl", mixed_kl_weight, temperature), topk_logits_k)


def distillkit_kl(temperature: float = 1.0, missing: str = "zero") -> DivergenceSpec:
    """Return DistillKit's forward KL times temperature², full or to a teacher of a few entries.

    In `sparse_divergence`, let w = exp(log-probability / temperature) of the teacher's entries
    at temperature 1. "zero": its log_probs are log(w / sum w), its log_tail -inf; the student is
    not renormalised. "symmetric_uniform": with r = (1 - kept mass)^(1 / temperature) they are
    log(w / (sum w + r)) and log(r / (sum w + r)). A top_k of `divergence` is neither: its "zero"
    leaves the teacher as it is too, and its tail is the teacher's at the temperature.

    Raises:
        ValueError: missing is another name.

    Source:
        `dense_kl_div`, `sparse_kl_div` and `KLDLoss`, github.com/arcee-ai/DistillKit at a61c2e7.
        The tails there are one less the kept mass, within 1e-8 of 0 and 1.
    """
    kept = {"zero": "zero", "symmetric_uniform": "tail"}
    if missing not in kept:
        raise ValueError(f"missing of distillkit_kl must be one of {tuple(kept)}, got {missing!r}")
    return DivergenceSpec("forward_kl", 0.5, temperature, "t2", missing=kept[missing])


def hinton(temperature: float = 2.0) -> DivergenceSpec:
    """Return the cross-entropy with the teacher's softened probabilities, times temperature².

    Source:
        Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2, which names no temperature.
    """
    return DivergenceSpec("soft_ce", 0.5, temperature, "t2")


def _top_k(spec: DivergenceSpec, top_k: int | None) -> DivergenceSpec:
    """Return the spec over the teacher's top_k, both sides renormalised, or as it is without."""
    if top_k is None:
        return spec
    return replace(spec, support="teacher_topk", top_k=top_k, missing="renormalise")


PRESETS: dict[str, Callable[..., DivergenceSpec]] = {
    "opsd": opsd,
    "opsd_clip": opsd_clip,
    "trl_gkd": trl_gkd,
    "trl_distillation": trl_distillation,
    "sdft": sdft,
    "sdpo": sdpo,
    "liger_jsd": liger_jsd,
    "ms_swift_gkd": ms_swift_gkd,
    "kdflow_jsd": kdflow_jsd,
    "nemo_mixed": nemo_mixed,
    "distillkit_kl": distillkit_kl,
    "hinton": hinton,
}
NAMES = tuple(PRESETS)


def preset(name: str, **arguments: float | int | str | None) -> DivergenceSpec:
    """Return the spec of another library's loss, e.g. `preset("liger_jsd", beta=0.1)`.

    Args:
        name: a function of this module, whose docstring names the source.
        **arguments: that function's, in the convention of the source.

    Raises:
        ValueError: the name is unknown.
        TypeError: the preset has no such argument.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {NAMES}, got {name!r}")
    return PRESETS[name](**arguments)
