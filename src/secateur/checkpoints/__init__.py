"""Checkpoints on disk: loaded, saved with a model card, packed, inspected. `sources` finds and checks them."""
