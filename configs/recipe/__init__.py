"""Hydra group `recipe`."""
