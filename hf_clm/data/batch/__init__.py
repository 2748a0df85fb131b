"""Turns rows into batches: packing, mixing, ordering and collation."""
