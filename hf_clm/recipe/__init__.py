"""The recipe: sections, YAML, overrides, and what is checked before anything is loaded."""
