"""How fast a recipe trains on this machine."""
