"""The machine: processes, memory budgets, chunk sizes, crash-safe files, the environment.

Nothing here knows a model or a matrix.
"""
