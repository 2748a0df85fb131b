"""The model: loading, attention, losses, adapters."""
