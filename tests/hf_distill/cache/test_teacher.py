"""Training from a cache is training from the teacher that was cached, or an error."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_distill import DistillConfig, DistillTrainer, HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.cache import (
    CachedTeacher,
    CacheError,
    Codec,
    Full,
    HeadSamples,
    RowMismatch,
    Sampled,
    TeacherMismatch,
    TemperatureOutOfRange,
    TokenizerMismatch,
    TopK,
    UnsupportedDivergence,
    VocabSizeMismatch,
    cache_teacher,
)
from hf_distill.data.sides import Side, predicts_from_labels
from hf_distill.teachers import RoutedTeacher
from metal_ops import DivergenceSpec
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

WHOLE = TopK(top_k=models.VOCAB, num_exact=models.VOCAB, temperature_range=(1.0, 2.0))
CODECS = {
    "whole head": (WHOLE, 2e-3),
    "fp16": (Full("fp16"), 2e-3),
    "int8": (Full("int8"), 2e-2),
    "top 58": (TopK(top_k=58, temperature_range=(1.0, 2.0)), 0.02),
    "draws": (HeadSamples(top_k=16, num_samples=64), 0.12),
}


def teacher(seed: int = 1, **changes: Any) -> nn.Module:
    return models.llama(seed, **changes)


def cached(folder: Path, codec: Codec = WHOLE, rows: Any = None, **changes: Any) -> CachedTeacher:
    reading = {k: changes.pop(k) for k in ("tail", "max_ratio", "verify") if k in changes}
    given: dict[str, Any] = {"data_collator": models.Pad(), "batch_size": 3, "shard_rows": 4}
    given |= changes
    model = given.pop("model", None) or teacher()
    data = models.rows() if rows is None else rows
    cache_teacher(model, data, folder / "cache", codec=codec, **given)
    return CachedTeacher(folder / "cache", **reading)


def distil(folder: Path, taught_by: Any, **changes: Any) -> DistillTrainer:
    data, collator = changes.pop("rows", models.rows()), changes.pop("collator", models.Pad())
    processing_class, model = changes.pop("tokenizer", None), changes.pop("model", None)
    return DistillTrainer(
        models.llama() if model is None else model,
        DistillConfig(**models.options(folder, **changes)),
        collator,
        data,
        processing_class=processing_class,
        teacher=taught_by,
    )


def losses(trainer: DistillTrainer, name: str = "loss") -> list[float]:
    trainer.train()
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("name", CODECS)
def test_a_run_from_the_cache_is_the_run_with_the_teacher(
    tmp_path: Path, name: str, divergence: str, temperature: float
) -> None:
    codec, tolerance = CODECS[name]
    settings = {"divergence": divergence, "temperature": temperature, "alpha": 1.0}
    live = distil(tmp_path, teacher(), **settings)
    other = distil(tmp_path, cached(tmp_path, codec), **settings)
    moved = models.weights(live.model)
    expected = losses(live)
    assert losses(other) == pytest.approx(expected, rel=tolerance)
    if name not in ("top 58", "draws"):  # Adam's first steps magnify what little is missing
        way = models.difference(moved, models.weights(live.model))
        apart = models.difference(models.weights(live.model), models.weights(other.model))
        assert apart <= 0.2 * way


@pytest.mark.parametrize("divergence", ["k3", "policy_gradient", "uld"])
def test_a_cache_of_whole_distributions_serves_losses_that_read_them(
    tmp_path: Path, divergence: str
) -> None:
    settings = {"divergence": divergence, "temperature": 1.0, "alpha": 1.0}
    live = losses(distil(tmp_path, teacher(), **settings))
    found = cached(tmp_path, Full("fp16"))
    assert found.dense
    assert losses(distil(tmp_path, found, **settings)) == pytest.approx(live, rel=2e-3)


def test_no_token_is_scored_by_a_teacher_of_another_row(tmp_path: Path) -> None:
    """The signal of each token, compared with the model's own log-probabilities."""
    rows, model = models.rows(ignored=1), teacher()
    found = cached(tmp_path, rows=rows)
    for order in ([5], [3, 1, 2], [15, 0, 7, 7]):
        for collator in (models.Pad(), models.Pad("left"), models.Pad("right", 20)):
            batch = collator([rows[i] for i in order])
            side = Side(
                {k: batch[k] for k in ("input_ids", "attention_mask")},
                predicts_from_labels(batch["labels"]),
            )
            signal = found.signal(model, side).sparse
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
            with torch.no_grad():
                logits = model(**side.inputs, position_ids=positions).logits[side.predicts]
            wanted = logits.log_softmax(-1).gather(-1, signal.ids)
            assert len(wanted) == int(side.predicts.sum())
            torch.testing.assert_close(signal.log_probs, wanted, atol=6e-3, rtol=0)


def test_fewer_tokens_may_be_scored_than_were_stored(tmp_path: Path) -> None:
    fewer = copy.deepcopy(models.rows())
    for row in fewer:
        kept = len(row["labels"]) // 2
        row["labels"][:kept] = [-100] * kept
    live = distil(tmp_path, teacher(), rows=fewer)
    other = distil(tmp_path, cached(tmp_path), rows=fewer)
    assert losses(other, "soft") == pytest.approx(losses(live, "soft"), rel=2e-3)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("codec", [HeadSamples(top_k=8, num_samples=4), Full("fp16")])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_workers_read_what_the_main_process_reads(tmp_path: Path, codec: Codec, start: str) -> None:
    found = cached(tmp_path, codec)
    alone = losses(distil(tmp_path, found, train_sampling_strategy="random"))
    many = distil(
        tmp_path,
        CachedTeacher(tmp_path / "cache"),
        train_sampling_strategy="random",
        dataloader_num_workers=2,
    )
    loader = many.get_train_dataloader

    def started() -> Any:
        made = loader()
        made.multiprocessing_context = start
        return made

    many.get_train_dataloader = started
    assert losses(many) == alone


def test_without_draws_the_loader_reads_nothing_more(tmp_path: Path) -> None:
    """What the trainer's collator puts into a batch is what the teacher would read by itself."""
    found = cached(tmp_path, HeadSamples(top_k=8, num_samples=4))
    trainer = distil(tmp_path, found)
    rows = [models.rows()[i] for i in (2, 9, 4)]
    batch = trainer.data_collator(rows)
    side = Side(
        {k: batch[k] for k in ("input_ids", "attention_mask")},
        predicts_from_labels(batch["labels"]),
    )
    one = found.signal(trainer.model, side).sparse
    two = found.signal(trainer.model, side._replace(stored=batch["teacher_stored"])).sparse
    assert one.samples is not None
    assert one.powers is not None
    for a, b in zip(flat(one), flat(two), strict=True):
        assert a == b if not isinstance(a, Tensor) else torch.equal(a, b)


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [x for part in value for x in flat(part)]
    return [value]


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_the_tail_rule_reaches_the_loss(tmp_path: Path, tail: str) -> None:
    codec = HeadSamples(top_k=4, num_samples=8)
    auto = losses(distil(tmp_path, cached(tmp_path, codec), temperature=1.0, alpha=1.0))
    other = CachedTeacher(tmp_path / "cache", tail=tail)
    found = losses(distil(tmp_path, other, temperature=1.0, alpha=1.0))
    live = losses(distil(tmp_path, teacher(), temperature=1.0, alpha=1.0))
    assert abs(found[0] - live[0]) > 2 * abs(auto[0] - live[0])
    if tail == "bucket":
        assert found[0] < live[0]  # a category instead of entries says less


def opsd(folder: Path, taught_by: Any, **changes: Any) -> OPSDTrainer:
    collator = changes.pop("collator", None) or HintCollator(models.tokenizer())
    return OPSDTrainer(
        models.llama(),
        OPSDConfig(**models.options(folder, **{"on_policy": False} | changes)),
        collator,
        models.problems(),
        processing_class=collator.tokenizer,
        teacher=taught_by,
    )


def without_padding() -> nn.Module:
    """A teacher that gives the ids behind its tokenizer's no probability, as a cache does."""
    model = models.phi(1)
    with torch.no_grad():
        model.lm_head.bias[len(models.WORDS) :] = -1e4
    return model


def test_a_hinted_teacher_is_cached_with_its_hints(tmp_path: Path) -> None:
    collator = HintCollator(models.tokenizer())
    model = without_padding()
    found = cached(tmp_path, rows=models.problems(), data_collator=collator, model=model)
    live = losses(opsd(tmp_path, model))
    assert losses(opsd(tmp_path, found)) == pytest.approx(live, rel=2e-3)
    unhinted = HintCollator(models.tokenizer(), [])
    with pytest.raises(RowMismatch, match="no stored row has the ids"):
        opsd(tmp_path, found, collator=unhinted).train()


def test_sampled_completions_are_not_in_a_cache(tmp_path: Path) -> None:
    collator = HintCollator(models.tokenizer())
    found = cached(tmp_path, rows=models.problems(), data_collator=collator)
    with pytest.raises(ValueError, match="on_policy=False, got True"):
        opsd(tmp_path, found, on_policy=True)
    with pytest.raises(ValueError, match="on_policy=False, got True"):
        opsd(tmp_path, RoutedTeacher({"a": found}, "name"), on_policy=True)


def test_several_caches_by_a_column(tmp_path: Path) -> None:
    rows = [row | {"from": "ab"[i % 2]} for i, row in enumerate(models.rows())]
    one = cached(tmp_path / "a", rows=rows)
    two = cached(tmp_path / "b", rows=rows, model=teacher(2))
    several = RoutedTeacher({"a": one, "b": two}, "from")
    live = RoutedTeacher({"a": teacher(), "b": teacher(2)}, "from")
    settings = {"rows": rows, "remove_unused_columns": False}
    found = [losses(distil(tmp_path, x, **settings)) for x in (several, live)]
    assert found[0] == pytest.approx(found[1], rel=2e-3)


OTHER_SIZE = "one vocabulary, got 60 entries for the student and 61 for the teacher"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[CacheError], str]] = [
    ({}, {"temperature": 2.5}, TemperatureOutOfRange, "from 1 to 2, not 2.5"),
    ({}, {"temperature": 0.5}, TemperatureOutOfRange, "from 1 to 2, not 0.5"),
    ({}, {"temperature": 2.5, "alpha": 0.0}, TemperatureOutOfRange, "from 1 to 2, not 2.5"),
    ({}, {"model": models.llama(vocab_size=60)}, VocabSizeMismatch, OTHER_SIZE),
    ({}, {"rows": models.rows(seed=9)}, RowMismatch, "no stored row has the ids"),
    (
        {"rows": models.rows(ignored=2)},
        {"rows": [x | {"labels": x["input_ids"]} for x in models.rows(ignored=2)]},
        RowMismatch,
        "scored token at position 1",
    ),
]


@pytest.mark.parametrize(("written", "trained", "error", "words"), REFUSED)
def test_another_run_is_refused(
    tmp_path: Path,
    written: dict[str, Any],
    trained: dict[str, Any],
    error: type[CacheError],
    words: str,
) -> None:
    found = cached(tmp_path, HeadSamples(top_k=8), **written)
    with pytest.raises(error, match=words):
        distil(tmp_path, found, **trained).train()


def test_rows_for_evaluation_must_be_cached_too(tmp_path: Path) -> None:
    rows, held_out = models.rows(), models.rows(4, seed=9)
    run = distil(tmp_path, cached(tmp_path / "both", rows=[*rows, *held_out]))
    live = distil(tmp_path, teacher())
    found, wanted = (x.evaluate(held_out)["eval_soft"] for x in (run, live))
    assert found == pytest.approx(wanted, rel=2e-3)
    run = distil(tmp_path, cached(tmp_path / "one", rows=rows))
    with pytest.raises(RowMismatch, match="rows for evaluation must be cached too"):
        run.evaluate(held_out)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    collator, rows = HintCollator(models.tokenizer()), models.problems()
    found = cached(tmp_path, rows=rows, data_collator=collator)
    settings = {"rows": rows, "collator": collator, "remove_unused_columns": False}
    losses(distil(tmp_path, found, tokenizer=models.tokenizer(), **settings))
    template = models.tokenizer()
    template.chat_template += " "
    with pytest.raises(TokenizerMismatch, match="chat_template_sha256 must be"):
        distil(tmp_path, found, tokenizer=template, **settings)
    words = models.tokenizer()
    words.add_tokens(["more"])
    with pytest.raises(TokenizerMismatch, match="tokenizer's sha256 must be"):
        distil(tmp_path, found, tokenizer=words, **settings)


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    cached(tmp_path)
    for folder in (tmp_path / "cache", str(tmp_path / "cache")):
        with pytest.raises(ValueError, match="is a teacher cache, not a model: give Cache"):
            distil(tmp_path, folder)
    CachedTeacher(tmp_path / "cache", teacher=teacher())
    with pytest.raises(TeacherMismatch, match="weights_fingerprint must be"):
        CachedTeacher(tmp_path / "cache", teacher=teacher(2))
    with pytest.raises(TeacherMismatch, match="name_or_path must be 'a/b'"):
        CachedTeacher(tmp_path / "cache", teacher="a/b")


def test_a_loss_that_the_codec_does_not_serve_is_refused(tmp_path: Path) -> None:
    found = cached(tmp_path, TopK(top_k=8))
    with pytest.raises(UnsupportedDivergence, match="top_k of at least 9"):
        found.check_spec(DivergenceSpec("forward_kl", support="teacher_topk", top_k=9))
    found.check_spec(DivergenceSpec("forward_kl", support="teacher_topk", top_k=8))
    with pytest.raises(UnsupportedDivergence, match="stores no draws"):
        CachedTeacher(tmp_path / "cache", tail="sampled")
    with pytest.raises(ValueError, match="take another divergence"):
        distil(tmp_path, found, divergence="policy_gradient", temperature=1.0)
    assert cached(tmp_path / "other", Sampled(4), tail="sampled").rule.tail == "sampled"
    with pytest.raises(UnsupportedDivergence, match=r"stores draws only.*got 'bucket'"):
        CachedTeacher(tmp_path / "other" / "cache", tail="bucket")


@pytest.mark.parametrize(
    ("tail", "settings", "words"),
    [
        ("auto", {"clip": 0.5}, "tail='bucket'; got the bound"),
        ("sampled", {"support": "teacher_topk", "top_k": 8}, "needs support 'full'"),
        ("bucket", {"missing": "renormalise"}, "'bucket' needs missing 'tail'"),
    ],
)
def test_a_tail_rule_that_the_loss_contradicts_is_refused(
    tmp_path: Path, tail: str, settings: dict[str, Any], words: str
) -> None:
    found = cached(tmp_path, HeadSamples(top_k=8), tail=tail)
    with pytest.raises(UnsupportedDivergence, match=words):
        found.check_spec(DivergenceSpec("jsd", **settings))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tail": "none"}, "tail must be one of"),
        ({"max_ratio": 0.9}, "max_ratio must be at least 1"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CachedTeacher(tmp_path, **arguments)


def test_the_run_says_what_it_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_distill"):
        distil(tmp_path, cached(tmp_path))
    (line,) = [r.getMessage() for r in caplog.records if "from the cache" in r.getMessage()]
    assert "topk, 16 rows" in line
    assert "temperatures 1 to 2, tail auto" in line
