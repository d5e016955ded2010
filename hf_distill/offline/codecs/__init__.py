"""Codecs: what is stored of a teacher's distribution."""
