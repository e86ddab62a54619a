"""Another order of channels for n:m patterns, in which fewer large weights share a group.

Which channels of a model can be reordered is found by trying; the model computes the same in any order of them.
"""
