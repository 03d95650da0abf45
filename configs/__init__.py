"""Hydra groups: values only."""
