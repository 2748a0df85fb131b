"""What is proved of the rows before they are trained on."""
