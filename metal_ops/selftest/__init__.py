"""Holds inputs, exact numbers and the rule that compares for `python -m metal_ops selftest`."""

__all__: list[str] = []  # import the module that is meant
