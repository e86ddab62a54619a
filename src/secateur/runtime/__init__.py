"""The machine: processes, memory budgets, chunk sizes, messages, the environment."""
