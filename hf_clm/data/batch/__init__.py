"""Rows to batches: packed, mixed, put in order, collated."""
