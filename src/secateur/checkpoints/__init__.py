"""Checkpoints on disk: found, checked, loaded, saved with a model card, inspected; and the demo model."""
