"""What is looked at before the first step, so that a mistake costs seconds and not a run."""
