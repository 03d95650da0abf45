"""Replay, readers and action chunks."""
