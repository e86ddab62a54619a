"""Sparse weights in a bitmask format: its layout, its files, products on a CPU, and layers that hold it.

`layout` and `encoding` are the format (docs/format.md), `kernels` the products, `linear` the layer, and `quantizer`
what transformers calls. What packs a whole checkpoint folder is in `checkpoints/packing.py`. Nothing here prunes.
"""
