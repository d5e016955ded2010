"""Whether the ops are right on this machine: the numerics rule, its inputs, and a run of both."""
