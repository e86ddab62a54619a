"""What a transformers model is to this package: blocks found by watching it run, uses of weights, onloading.

Families are found by introspection; an exception is a row of a table, never a branch or a class for one family.
"""
