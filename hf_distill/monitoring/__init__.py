"""Monitoring: metrics, the watchdog, and checks before a run."""

from hf_distill.monitoring.completion_table import CompletionTable
from hf_distill.monitoring.metrics import TokenMeter
from hf_distill.monitoring.preflight import EmptyHintError, check_empty_hint
from hf_distill.monitoring.watchdog import Watchdog, WatchdogConfig, WatchdogError

__all__ = [
    "CompletionTable",
    "EmptyHintError",
    "TokenMeter",
    "Watchdog",
    "WatchdogConfig",
    "WatchdogError",
    "check_empty_hint",
]
