"""Monitoring: metrics, the watchdog, and checks before a run."""
