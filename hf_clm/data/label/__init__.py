"""Examples to rows: what is learned, what is only read."""
