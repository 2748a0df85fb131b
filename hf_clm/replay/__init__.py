"""Evaluation: likelihood, choices and generated answers."""
