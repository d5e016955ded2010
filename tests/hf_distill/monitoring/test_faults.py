"""Every fault, made for real in a tiny run, is reported by its name; healthy runs report nothing.

A model, a teacher or a setting is broken each time; no numbers are fed to the watchdog.
"""

import pytest

from hf_distill.monitoring.faults import CHECKS
from tests.hf_distill.monitoring import faults
from tests.hf_distill.monitoring.faults import reported
from tests.hf_distill.trainers import models

pytestmark = pytest.mark.filterwarnings(models.PEFT_WARNING)

EXPECTED = {
    faults.zeroed_teacher: {"teacher_uniform"},
    faults.zeroed_teacher_of_a_new_model: {"teacher_uniform"},
    faults.new_teacher: {"teacher_uniform"},
    faults.the_same_teacher: {"dead_signal"},
    faults.the_same_teacher_of_a_signed_loss: {"dead_signal"},
    faults.lost_hint: {"dead_signal"},
    faults.frozen_adapter: {"zero_gradient"},
    faults.detached_loss: {"zero_gradient"},
    faults.average_never_updated: {"ema_still"},
    faults.average_in_16_bits: {"ema_still"},
    faults.average_without_decay: {"ema_same"},
    faults.adapters_stay_on: {"teacher_follows"},
    faults.adapter_written_into_the_base: {"teacher_follows"},
    faults.shared_weights: {"teacher_follows"},
    faults.live_teacher: {"teacher_moves"},
    faults.never_ends: {"endless", "too_long"},
    faults.ends_at_once: {"too_short", "entropy_collapse"},
    faults.recites_the_hint: {"hint_copied"},
    faults.flat_teacher: {"teacher_uniform", "entropy_explosion"},
    faults.samples_too_hot: {"teacher_unsure", "teacher_moves", "entropy_explosion"},
    faults.tight_clip: {"clipped"},
}


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_a_fault_is_reported_by_its_name(tmp_path, caplog, make):
    assert reported(make(tmp_path), caplog) == EXPECTED[make]


def test_every_fault_is_made():
    assert set.union(*EXPECTED.values()) == {check.fault for check in CHECKS}


@pytest.mark.parametrize("make", faults.HEALTHY, ids=lambda make: make.__name__)
def test_a_healthy_run_is_quiet(tmp_path, caplog, make):
    assert reported(make(tmp_path), caplog) == set()
