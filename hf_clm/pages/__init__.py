"""Shows what the model is given, token by token: in the terminal and as a page."""
