"""The machine: processes, memory budgets, chunk sizes, messages, the environment.

Nothing here knows a model or a matrix.
"""
