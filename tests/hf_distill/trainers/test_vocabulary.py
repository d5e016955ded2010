"""Vocabularies that are padded differently: a run is that of models without padding."""

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import (
    DistillConfig,
    DistillTrainer,
    HintCollator,
    ModelTeacher,
    OPSDConfig,
    OPSDTrainer,
    RemoteTeacher,
    RemoteTeacherError,
    RoutedTeacher,
)
from hf_distill.cache import CachedTeacher, Full, HeadSamples, TopK, cache_teacher
from hf_distill.models.signals import Head, Signal, without_padding
from hf_distill.models.tokenizers import num_ids
from metal_ops import PowerSums, SparseTeacher, TailSamples
from tests.hf_distill.teachers.serving import serving
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

WORDS = models.tokenizer()
IDS = num_ids(WORDS)
STUDENT, TEACHER = models.VOCAB, 50


def unpadded(model: nn.Module) -> nn.Module:
    """The model without the entries behind the tokenizer's ids."""
    model.resize_token_embeddings(IDS)
    return model


def teacher(seed: int = 1, size: int = TEACHER, family: str = "llama") -> Any:
    model = models.FAMILIES[family](seed)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def distil(folder: Path, student: Any, taught_by: Any, **changes: Any) -> DistillTrainer:
    collator = changes.pop("collator", None) or HintCollator(WORDS, ())
    data = changes.pop("data", models.problems())
    tokenizer = changes.pop("tokenizer", WORDS)
    more = {k: changes.pop(k) for k in ("compute_metrics", "compute_loss_func") if k in changes}
    settings = {"remove_unused_columns": False} | changes
    return DistillTrainer(
        student,
        DistillConfig(**models.options(folder, **settings)),
        collator,
        data,
        data[:4],
        processing_class=tokenizer,
        teacher=taught_by,
        **more,
    )


# Two orders of summing float32 logits of order 1: 25 eps; weights move by 1e-3 a step
def same_runs(one: DistillTrainer, other: DistillTrainer, tolerance: float = 3e-6) -> None:
    """`one` has padded vocabularies, `other` none."""
    before = models.weights(one.model)
    for trainer in (one, other):
        trainer.train()
    for mine, theirs in zip(models.steps(one), models.steps(other), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    after, want = models.weights(one.model), models.weights(other.model)
    assert after.keys() == want.keys()
    for name, value in after.items():
        kept = value[: len(want[name])]
        torch.testing.assert_close(kept, want[name], rtol=0, atol=10 * tolerance)
        if len(value) > len(kept):  # no gradient has reached what is padding
            assert torch.equal(value[IDS:], before[name][IDS:]), name
    assert models.difference(before, after) > 1e-3


@pytest.mark.parametrize("family", ["llama", "tied", "phi", "gemma2"])
def test_padded_entries_take_no_part(tmp_path: Path, family: str) -> None:
    padded = distil(tmp_path, models.FAMILIES[family](), teacher(family=family))
    bare = unpadded(models.FAMILIES[family]())
    same_runs(padded, distil(tmp_path, bare, unpadded(teacher(family=family))))


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "k3", "temperature": 1.0},
        {"divergence": "reverse_kl", "alpha": 1.0},
        {"label_smoothing_factor": 0.1},
        {"taid": {}},
        {"hidden_layers": "last"},
        {"token_weights": {"entropy": 0.5}},
    ],
    ids=["sampled", "soft alone", "label smoothing", "taid", "hidden", "entropy"],
)
def test_every_loss_is_cut(tmp_path: Path, changes: dict[str, Any]) -> None:
    padded = distil(tmp_path, models.llama(), teacher(), **changes)
    bare = distil(tmp_path, unpadded(models.llama()), unpadded(teacher()), **changes)
    same_runs(padded, bare)


def test_a_smaller_student_is_cut_too_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_distill"):
        padded = distil(tmp_path, teacher(0), models.llama(1))
    said = [r.getMessage() for r in caplog.records if "vocabulary" in r.getMessage()]
    assert said == [
        "vocabulary: both sides are cut to the tokenizer's 43 ids: 7 padded entries of the "
        "student's 50, 18 of the teacher's 61"
    ]
    same_runs(padded, distil(tmp_path, unpadded(teacher(0)), unpadded(models.llama(1))))


def test_equal_sizes_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_distill"):
        trainer = distil(tmp_path, models.llama(), models.llama(1))
    assert not [r for r in caplog.records if "vocabulary" in r.getMessage()]
    before = models.weights(trainer.model)["lm_head.weight"]
    trainer.train()
    assert (models.weights(trainer.model)["lm_head.weight"] - before)[IDS:].abs().max() > 1e-4


def test_predictions_for_metrics_are_cut(tmp_path: Path) -> None:
    def metrics(found: Any) -> dict[str, float]:
        return {"width": found.predictions.shape[-1]}

    padded = distil(tmp_path, models.llama(), teacher(), compute_metrics=metrics)
    bare = distil(tmp_path, unpadded(models.llama()), unpadded(teacher()), compute_metrics=metrics)
    found, want = padded.evaluate(), bare.evaluate()
    assert found["eval_width"] == IDS
    for name in ("eval_loss", "eval_soft", "eval_hard", "eval_student_entropy"):
        assert found[name] == pytest.approx(want[name], rel=3e-6)


def test_an_own_loss_function_sees_what_is_cut(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        assert outputs.logits.shape[-1] == IDS
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return loss / num_items_in_batch

    runs = [
        distil(tmp_path, student, taught_by, compute_loss_func=own)
        for student, taught_by in (
            (models.llama(), teacher()),
            (unpadded(models.llama()), unpadded(teacher())),
        )
    ]
    same_runs(*runs)


@pytest.mark.parametrize("changes", [{}, {"token_weights": {"entropy": 0.5}}], ids=["", "entropy"])
@pytest.mark.parametrize(
    "codec",
    [
        TopK(top_k=8, temperature_range=(1.0, 2.0)),
        HeadSamples(top_k=8, temperature_range=(1.0, 2.0)),
        Full(),
    ],
    ids=["top k", "draws", "dense"],
)
def test_a_cached_teacher(tmp_path: Path, codec: Any, changes: dict[str, Any]) -> None:
    collator = HintCollator(WORDS, ())
    for name, model in (("padded", teacher()), ("bare", unpadded(teacher()))):
        cache_teacher(model, models.problems(), tmp_path / name, codec=codec,
                      data_collator=collator, batch_size=3, shard_rows=4)  # fmt: skip
    padded = distil(tmp_path, models.llama(), CachedTeacher(tmp_path / "padded"), **changes)
    bare = CachedTeacher(tmp_path / "bare")
    # what is stored is rounded to 16 bits, here and there alike but for the last of them
    same_runs(padded, distil(tmp_path, unpadded(models.llama()), bare, **changes), tolerance=2e-5)


def test_a_remote_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    bare = distil(tmp_path, unpadded(models.llama()), unpadded(teacher()), temperature=1.0)
    with (
        serving(teacher()) as state,
        closing(RemoteTeacher(state.url, "tiny", TEACHER, vocab_size=TEACHER)) as remote,
    ):
        state.words = lambda i: WORDS.decode([i])
        padded = distil(tmp_path, models.llama(), remote, temperature=1.0)
        assert padded._vocabulary.size == IDS
        same_runs(padded, bare, 5e-6)


def test_a_server_with_more_entries_must_say_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with (
        serving(models.llama(1)) as state,
        closing(RemoteTeacher(state.url, "tiny", TEACHER)) as remote,
    ):
        state.words = lambda i: WORDS.decode([i])
        with pytest.raises(RemoteTeacherError, match=r"'s 50 ids, it knows 61; .* vocab_size=61"):
            distil(tmp_path, teacher(0), remote, temperature=1.0)
        remote.vocab_size = models.VOCAB
        distil(tmp_path, teacher(0), remote, temperature=1.0).train()
        remote.vocab_size = TEACHER - 1
        with pytest.raises(ValueError, match=r"top_k must be at most .*, got 50 and 49"):
            distil(tmp_path, teacher(0), remote, temperature=1.0)


def test_routed_teachers_of_several_sizes(tmp_path: Path) -> None:
    data = [row | {"who": "ab"[i % 2]} for i, row in enumerate(models.problems())]

    def run(student: Any, one: Any, other: Any) -> DistillTrainer:
        routes = RoutedTeacher({"a": one, "b": other}, "who")
        collator = HintCollator(WORDS, ())
        return distil(tmp_path, student, routes, collator=collator, data=data)

    padded = run(models.llama(), teacher(1, 50), teacher(2, 55))
    bare = run(unpadded(models.llama()), unpadded(teacher(1)), unpadded(teacher(2)))
    same_runs(padded, bare)


def test_reused_completions_are_weighed_by_what_is_cut(tmp_path: Path) -> None:
    suppressed = {"suppress_tokens": list(range(IDS, models.VOCAB))}
    rollout = {"steps_per_rollout": 2, "importance_clip": 2.0, "generation_kwargs": suppressed}
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(tmp_path, rollout=rollout, max_completion_length=6)),
        None,
        models.problems(),
        processing_class=WORDS,
        teacher=ModelTeacher(teacher()),
    )
    trainer.train()
    assert models.steps(trainer)[0]["importance_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert models.steps(trainer)[1]["importance_ratio"] != pytest.approx(1.0, abs=1e-6)


def test_the_log_probs_of_reused_completions_have_no_label_beyond_the_cut(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [-100, 6, 44, 8]}]
    trainer = OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(tmp_path, max_completion_length=6)),
        None,
        models.problems(),
        processing_class=WORDS,
        teacher=ModelTeacher(teacher()),
    )
    with pytest.raises(ValueError, match="labels of row 0, position 2, is 44"):
        trainer.behaviour_log_probs(models.Pad()(rows))


def test_a_label_beyond_the_cut_is_named(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [-100, 6, 44, 8]}]
    trainer = distil(tmp_path, models.llama(), teacher(), collator=models.Pad(), data=rows)
    words = "below the tokenizer's 43 ids, .*: labels of row 0, position 2, is 44"
    with pytest.raises(ValueError, match=words):
        trainer.train()


# Signals


def known(vocab: int, size: int, temperature: float = 1.0) -> tuple[SparseTeacher, Tensor]:
    """A sparse teacher that knows `size` of the entries, the largest, and all probabilities."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, vocab).double()
    log_p = logits.log_softmax(-1)
    log_probs, ids = log_p.topk(size)
    rest = log_p.scatter(-1, ids, -torch.inf)
    powers = PowerSums(
        (0.5,),
        (0.5 * rest).logsumexp(-1, keepdim=True),
        torch.full((6,), float(vocab - size)),
        (1.0, 2.0),
    )
    return SparseTeacher(ids, log_probs, rest.logsumexp(-1), 1.0, None, powers), logits


def test_a_sparse_signal_is_renormalised() -> None:
    sparse, logits = known(12, 12)
    sparse = sparse._replace(powers=None)
    found = without_padding(Signal(sparse=sparse), 9).sparse
    want = logits[:, :9].log_softmax(-1)
    kept = found.ids >= 0
    assert kept.sum(-1).tolist() == [9] * 6
    assert (sparse.ids[~kept] >= 9).all()
    dense = torch.full((6, 9), torch.nan).double()
    dense.scatter_(1, found.ids.clamp_min(0), found.log_probs.where(kept, torch.nan))
    torch.testing.assert_close(found.log_probs[kept].exp().sum(), torch.tensor(6.0).double())
    for i in range(6):
        own = found.ids[i][kept[i]]
        torch.testing.assert_close(found.log_probs[i][kept[i]], want[i, own], rtol=0, atol=1e-12)
    assert (found.log_probs[~kept] == -torch.inf).all()


def test_a_tail_and_its_power_sums_grow_alike() -> None:
    sparse, _ = known(12, 4)
    found = without_padding(Signal(sparse=sparse), 9).sparse
    lost = (sparse.log_probs.exp() * (sparse.ids >= 9)).sum(-1)
    assert (lost > 0).any()
    assert (lost == 0).any()
    torch.testing.assert_close(found.log_tail.exp(), sparse.log_tail.exp() / (1 - lost))
    moved, before = found.at(2.0), sparse.at(2.0)
    # at any temperature the kept entries keep their ratios to each other and to the tail
    kept = found.ids >= 0
    one = (moved.log_probs - moved.log_tail[:, None])[kept]
    torch.testing.assert_close(one, (before.log_probs - before.log_tail[:, None])[kept])
    untouched = lost == 0
    assert torch.equal(found.log_probs[untouched], sparse.log_probs[untouched])


def test_draws_of_padding_are_none() -> None:
    sparse, _ = known(12, 7)
    draws = TailSamples(
        torch.tensor([[3, 11, -1]]).expand(6, 3),
        torch.tensor([[-3.0, -4.0, -torch.inf]]).double().expand(6, 3),
        torch.tensor([[0.5, 0.5, -torch.inf]]).double().expand(6, 3),
    )
    found = without_padding(Signal(sparse=sparse._replace(samples=draws)), 9).sparse
    assert found.samples.ids.tolist() == [[3, -1, -1]] * 6
    assert (found.samples.log_probs[:, 1:] == -torch.inf).all()
    assert (found.samples.log_weights[:, 1:] == -torch.inf).all()
    shift = (found.log_tail - sparse.log_tail)[:, None]
    torch.testing.assert_close(found.samples.log_probs[:, :1], draws.log_probs[:, :1] + shift)


def test_gradients_reach_the_rows_that_are_kept() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(9, 4, requires_grad=True), torch.randn(9, requires_grad=True)
    signal = Signal(hidden=torch.randn(5, 4), head=Head(weight, bias, 2.0, 3.0))
    cut = without_padding(signal, 6)
    # a narrower product may sum in another order: two sums of 5 terms whose sizes add up to 12.5
    # are 2 * 4 * 2^-24 * 12.5 = 6e-6 apart at most, and are doubled
    torch.testing.assert_close(cut.dense(), signal.dense()[:, :6], rtol=0, atol=1.2e-5)
    assert cut.head.weight.data_ptr() == weight.data_ptr()
    cut.dense().sum().backward()
    for leaf in (weight, bias):
        assert leaf.grad[:6].abs().amin() > 0
        assert leaf.grad[6:].abs().max() == 0
    dense = without_padding(Signal(logits=signal.dense()), 6)
    assert torch.equal(dense.logits, signal.dense()[:, :6])


@pytest.mark.parametrize("size", [models.VOCAB - 20, models.VOCAB + 3])
@pytest.mark.parametrize("routed", [False, True])
def test_uld_with_an_object_of_another_size_needs_a_batch_of_both_tokenizers(
    tmp_path: Path, size: int, routed: bool
) -> None:
    """The tokenizer of a model object is not known, but it cannot be the student's."""
    data = [row | {"of": "one"} for row in models.problems()]

    def run(taught_by: Any, **changes: Any) -> Any:
        taught_by = RoutedTeacher({"one": taught_by}, "of") if routed else taught_by
        settings = {"divergence": "uld", "data": data} | changes
        return distil(tmp_path, models.llama(), taught_by, **settings)

    words = f"need batches of a CrossTokenizerCollator, got 61 entries for the student and {size}"
    for tokenizer in (WORDS, None):
        with pytest.raises(ValueError, match=words):
            run(models.llama(1, vocab_size=size), tokenizer=tokenizer).train()
    run(models.llama(1)).train()  # as many: nothing tells them apart
    if size > models.VOCAB:  # padding of one tokenizer, which is known here
        run(ModelTeacher(models.llama(1, vocab_size=size), tokenizer=WORDS)).train()
        run(models.llama(1, vocab_size=size), divergence="forward_kl").train()
