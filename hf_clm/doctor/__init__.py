"""Checks before the first step, so that a mistake costs seconds instead of a run."""
