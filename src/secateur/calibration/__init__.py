"""From texts to what flows through the model: batches, the dense pass, the stream from block to block, Hessians.

Nothing here changes a weight.
"""
