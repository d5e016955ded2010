"""A trial of a search for hyperparameters is a run with the trial's values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import integrations
from transformers import trainer as module
from transformers.trainer_utils import HPSearchBackend

from hf_distill import SelfTeacher
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.restarting import distil, fresh, opsd

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)


class Trial(dict[str, Any]):
    """A trial of chosen values, which needs no Optuna."""

    params = property(dict)
    number = 0


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Runs trials with given values as the Trainer's backend does; returns the objectives."""

    monkeypatch.setattr(integrations, "hp_params", dict)

    def go(trainer: Any, trials: list[dict[str, Any]], **kwargs: Any) -> list[float]:
        found = []

        class Backend:
            ensure_available = staticmethod(lambda: None)
            default_hp_space = staticmethod(dict)

            @staticmethod
            def run(owner: Any, n_trials: int, direction: str, **_: Any) -> Any:
                for values in trials:
                    owner.objective = None
                    owner.train(trial=Trial(values))
                    found.append(owner.compute_objective(owner.evaluate()))

        known = {HPSearchBackend.OPTUNA: Backend}
        monkeypatch.setattr(module, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", known)
        trainer.eval_dataset = trainer.train_dataset
        trainer.hyperparameter_search(backend="optuna", n_trials=len(trials), **kwargs)
        return found

    return go


SEARCHED = {
    "a schedule": [
        {"alpha": 1.0},
        {"alpha": "linear:1->0@3"},
        {"alpha": "0.25"},
        {"alpha": "cosine:0->1@3"},
    ],
    "taid": [{"taid": {"t_start": 0.5}}, {"taid": None}, {"taid": {"t_start": 0.1}}],
    "hidden layers": [
        {"hidden_weight": 2.0},
        {"hidden_layers": "uniform"},
        {"hidden_layers": None},
    ],
    "projections": [{"hidden_layers": "uniform"}, {"hidden_layers": [1]}],
    "ema": [{"learning_rate": 0.2}, {"temperature": "linear:1->4@3"}],
    "base": [{"divergence": "jsd", "beta": 0.3}, {"divergence": "reverse_kl", "beta": 0.5}],
}


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_trial_is_the_run_of_its_values(tmp_path: Path, search: Any, kind: str) -> None:
    trainer = distil(tmp_path, kind, model_init=fresh)
    logs = []
    train = trainer.train

    def kept(*args: Any, **kwargs: Any) -> None:
        train(*args, **kwargs)
        logs.append(list(models.steps(trainer)))

    trainer.train = kept  # pyright: ignore[reportAttributeAccessIssue]
    objectives = search(trainer, SEARCHED[kind])
    settings: dict[str, Any] = {}
    for values, log, objective in zip(SEARCHED[kind], logs, objectives, strict=True):
        settings |= values
        alone = distil(tmp_path, kind, model=models.llama(), **settings)
        alone.eval_dataset = alone.train_dataset
        alone.train()
        assert models.steps(alone) == log
        assert objective == alone.evaluate()["eval_loss"]


def test_a_trial_changes_the_teacher_that_the_config_names(tmp_path: Path, search: Any) -> None:
    trainer = opsd(tmp_path, "ema", model_init=fresh)
    trials = [{"self_teacher": {"ema_decay": 0.9}}, {"teacher": "base"}]
    search(trainer, trials)
    assert isinstance(trainer.teacher, SelfTeacher)
    assert (trainer.teacher.kind, trainer.teacher.ema_decay) == ("base", 0.9)


def test_a_trial_with_a_wrong_value_is_an_error(tmp_path: Path, search: Any) -> None:
    trainer = distil(tmp_path, "ema", model_init=fresh)
    with pytest.raises(ValueError, match="alpha must be in"):
        search(trainer, [{"alpha": 1.5}])


def test_the_objective_is_what_the_user_measures(tmp_path: Path, search: Any) -> None:
    """Not the sum of the metrics that are added to an evaluation."""
    trainer = distil(tmp_path, "ema", model_init=fresh)
    trainer.compute_metrics = lambda _: {"mine": 3.0, "other": 4.0}
    assert search(trainer, [{}]) == [7.0]


def eval_hard(metrics: dict[str, float]) -> float:
    return metrics["eval_hard"]


def shown(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [r.getMessage() for r in caplog.records if r.name == "hf_distill.trainers.restarts"]
    return [text for text in texts if "the losses of its trials cannot be compared" in text]


@pytest.mark.parametrize(
    ("trials", "named"),
    [
        ([{"alpha": 1.0}, {"alpha": 0.5}], "the search changes alpha, of which eval_loss is"),
        ([{}, {"beta": 0.3, "temperature": 1.5}], "changes temperature and beta, of"),
        ([{"token_weights": {"entropy": 1.0}}], "changes token_weights, of"),
        ([{"learning_rate": 0.1, "taid": None}], None),
    ],
)
def test_losses_of_different_scales_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, search: Any, trials: Any, named: str | None
) -> None:
    settings = {"divergence": "jsd"}
    trainer = distil(tmp_path, "ema", model_init=fresh, **settings)
    search(trainer, trials)
    assert len(shown(caplog)) == (named is not None)
    if named is not None:
        assert named in shown(caplog)[0]
        assert 'compute_objective=lambda metrics: metrics["eval_hard"]' in shown(caplog)[0]


def test_another_objective_compares_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, search: Any
) -> None:
    """Nothing is said, and nothing of a training that is no trial."""
    trainer = distil(tmp_path, "ema", model_init=fresh)
    found = search(trainer, [{"alpha": 1.0}, {"alpha": 0.5}], compute_objective=eval_hard)
    assert found[-1] == trainer.evaluate()["eval_hard"]
    trainer.train()
    trainer.compute_metrics = lambda _: {"mine": 3.0}
    search(trainer, [{"alpha": 1.0}])
    assert not shown(caplog)


def test_sampled_completions_have_no_such_objective(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, search: Any
) -> None:
    trainer = opsd(tmp_path, "ema", model_init=fresh, on_policy=True, max_completion_length=4)
    search(trainer, [{"temperature": 1.5}])
    (text,) = shown(caplog)
    assert text.endswith("give a compute_objective of your own, such as an accuracy")
