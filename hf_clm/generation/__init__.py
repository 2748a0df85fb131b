"""Generation with the prompt format and stop tokens of training."""
