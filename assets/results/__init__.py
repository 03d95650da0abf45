"""Recorded results as CSV."""
