"""What a user asks for, as data: the recipe, its sections and rules, the presets, and the recipe file.

Every option is declared here, once: name, type, default, range and help text. Nothing here imports torch or computes
anything. The code that reads an option lives in `solvers` or `pruning`.
"""
