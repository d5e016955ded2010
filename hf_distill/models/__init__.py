"""Models: what they are made of, and what they say about scored tokens."""
