"""Recorded results, statistics and figures."""
