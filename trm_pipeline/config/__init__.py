"""Settings of a run: presets, the numbers of losses, variants."""
