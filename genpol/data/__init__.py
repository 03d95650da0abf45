"""Where batches come from when they do not come straight from the environment."""
