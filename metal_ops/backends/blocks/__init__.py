"""Blocks of rows in PyTorch: from logits or hidden states to losses and gradients.

`linear` cuts hidden states into chunks whose logits `block` reduces, over the full vocabulary
(`full`) or some entries of it (`support`, `tail`); `hidden` compares hidden states themselves.
`rows` and `terms` hold what all kinds share, `sizes` how many rows are taken at a time.
"""

__all__: list[str] = []  # import the module that is meant
