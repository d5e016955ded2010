"""Servers: a teacher's hidden states for students on other machines or in other processes."""

from hf_distill.serving.command import add_serve
from hf_distill.serving.server import HiddenStateServer

__all__ = ["HiddenStateServer", "add_serve"]
