"""Offline distillation: a teacher's answers on disk, and a teacher that reads them."""
