"""From what a user calls a model to a local folder of an ordinary checkpoint, checked before anything loads it.

Folders, hub names, GGUF files, the demo model, packed folders, and the cache of models that were made from others.
Loading and saving are in `checkpoints`.
"""
