"""The loop and its steps: observe, solve, refit, commit, replay; allocation and Fisher information before it.

Steps read their options from the recipe. Nothing here knows a model family, a file format or a command.
"""
