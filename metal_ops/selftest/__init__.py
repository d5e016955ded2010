"""Inputs, exact numbers and the rule that compares: what `python -m metal_ops selftest` runs."""

__all__: list[str] = []  # import the module that is meant
