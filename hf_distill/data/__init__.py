"""Data: rows and batches, hints in them, and which of their tokens are scored."""
