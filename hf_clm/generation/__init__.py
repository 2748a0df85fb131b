"""Generation with the prompts and stop tokens of training."""
