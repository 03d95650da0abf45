"""Hydra group `env`."""
