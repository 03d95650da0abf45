"""Hydra group `agent`."""
