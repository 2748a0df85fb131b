"""Evaluation: sums over tokens, and the text a model generates."""
