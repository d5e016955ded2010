"""The losses of other libraries as specs; `DivergenceSpec.preset(name)` finds them here.

Each takes the arguments of its source, in the convention of its source, and gives the divergence
per token. How a library averages over tokens is named where it is not the mean over all of them.
"""

from dataclasses import replace

from metal_ops.spec import DivergenceSpec

NAMES = (
    "opsd",
    "opsd_clip",
    "trl_gkd",
    "trl_distillation",
    "sdft",
    "sdpo",
    "liger_jsd",
    "ms_swift_gkd",
    "kdflow_jsd",
    "nemo_mixed",
    "distillkit_kl",
    "hinton",
)


def opsd(beta: float = 0.5, temperature: float = 1.0, top_k: int | None = None) -> DivergenceSpec:
    """Generalized JSD of OPSD's release, over the teacher's top_k (renormalised) if given.

    Source:
        `OPSDTrainer.generalized_jsd_loss`, github.com/siyan-zhao/OPSD.
    """
    return _top_k(DivergenceSpec("jsd", beta, temperature), top_k)


def opsd_clip(
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    token_clip: float = 0.05,
) -> DivergenceSpec:
    """`opsd` with each vocabulary entry of the divergence cut at token_clip nats.

    To reproduce its runs: a cut entry can turn a token's gradient away from the teacher.

    Source:
        As `opsd`.
    """
    return _top_k(DivergenceSpec("jsd", beta, temperature, clip=token_clip), top_k)


def trl_gkd(beta: float = 0.5, temperature: float = 1.0) -> DivergenceSpec:
    """Generalized JSD of TRL's GKDTrainer; the trainer itself leaves temperature at 1 here.

    Source:
        `GKDTrainer.generalized_jsd_loss`, TRL 1.16.
    """
    return DivergenceSpec("jsd", beta, temperature)


def trl_distillation(beta: float = 1.0, temperature: float = 1.0) -> DivergenceSpec:
    """Generalized JSD of TRL's DistillationTrainer, by default the reverse KL.

    Source:
        `DistillationTrainer` and `ChunkedDivergenceFunction`, TRL 1.16.
    """
    return DivergenceSpec("jsd", beta, temperature)


def sdft(
    distillation_alpha: float = 0.5,
    distillation_topk: int | None = 100,
    distillation_add_tail: bool = False,
    temperature: float = 1.0,
) -> DivergenceSpec:
    """Divergence of TRL's SDFTTrainer, over the student's top-k; the mean is one of row means.

    Source:
        `compute_topk_self_distillation_loss`, TRL 1.16 (trl.experimental.sdft). There the tail is
        one less the kept mass; here it is summed.
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
    """Divergence of TRL's SDPOTrainer over logits; the mean is one of row means.

    Source:
        trl.experimental.sdpo, TRL 1.16, as `sdft`. Its default mode, the policy gradient of
        sampled tokens, is not a divergence between logits.
    """
    return sdft(distillation_alpha, distillation_topk, distillation_add_tail, temperature)


def liger_jsd(beta: float = 0.5, temperature: float = 1.0) -> DivergenceSpec:
    """Generalized JSD of Liger's chunked loss.

    Source:
        `LigerFusedLinearJSDFunction.distillation_loss_fn`, liger-kernel 0.8.5.
    """
    return DivergenceSpec("jsd", beta, temperature)


def ms_swift_gkd(
    beta: float = 0.5, temperature: float = 1.0, gkd_logits_topk: int | None = None
) -> DivergenceSpec:
    """Generalized JSD of ms-swift's GKD, over the teacher's top-k (renormalised) if given.

    Source:
        `GKDTrainer.generalized_jsd_loss`, github.com/modelscope/ms-swift.
    """
    return _top_k(DivergenceSpec("jsd", beta, temperature), gkd_logits_topk)


def kdflow_jsd(beta: float = 0.5, temperature: float = 1.0) -> DivergenceSpec:
    """JSD of KDFlow, whose beta is the weight of the student: the spec has 1 - beta.

    Raises:
        ValueError: beta is not between 0 and 1; the source has no limits there.

    Source:
        the jsd loss of KDFlow.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta of kdflow_jsd must be in (0, 1), got {beta}")
    return DivergenceSpec("jsd", 1 - beta, temperature)


def nemo_mixed(
    mixed_kl_weight: float = 0.5, topk_logits_k: int | None = 64, temperature: float = 1.0
) -> DivergenceSpec:
    """Weighted sum of forward and reverse KL of NeMo-RL, over the teacher's top-k (renormalised).

    Source:
        `DistillationLossFn` with kl_type "mixed", github.com/NVIDIA-NeMo/RL.
    """
    return _top_k(DivergenceSpec("mixed_kl", mixed_kl_weight, temperature), topk_logits_k)


def distillkit_kl(
    temperature: float = 1.0, top_k: int | None = None, missing: str = "zero"
) -> DivergenceSpec:
    """Forward KL of DistillKit times temperature², over the teacher's top-k if given.

    Source:
        the sparse KL of github.com/arcee-ai/DistillKit at a61c2e7, missing probability "zero".
    """
    if top_k is None:
        return DivergenceSpec("forward_kl", 0.5, temperature, "t2")
    return DivergenceSpec(
        "forward_kl", 0.5, temperature, "t2", support="teacher_topk", top_k=top_k, missing=missing
    )


def hinton(temperature: float = 2.0) -> DivergenceSpec:
    """Cross-entropy with the teacher's softened probabilities, times temperature².

    Source:
        Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.
    """
    return DivergenceSpec("soft_ce", 0.5, temperature, "t2")


def _top_k(spec: DivergenceSpec, top_k: int | None) -> DivergenceSpec:
    """The spec over the teacher's top_k, both sides renormalised; unchanged without top_k."""
    if top_k is None:
        return spec
    return replace(spec, support="teacher_topk", top_k=top_k, missing="renormalise")
