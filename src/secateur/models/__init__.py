"""What a transformers model is to us: blocks found by watching it run, uses of weights, onloading, 2:4 weights.

Families are found by introspection; an exception is a row of a table, never a branch or a class for one family.
"""
