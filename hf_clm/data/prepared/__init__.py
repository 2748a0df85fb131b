"""A prepared set: made in blocks, kept as Arrow files, opened as memory maps."""
