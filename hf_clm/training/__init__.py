"""Training: ``run.py`` is where to begin."""
