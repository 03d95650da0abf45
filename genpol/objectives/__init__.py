"""Losses and advantage estimators as pure functions."""
