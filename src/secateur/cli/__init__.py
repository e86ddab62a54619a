"""The command line: parse, call the API, print. Nothing here computes, and `--help` does not import torch."""
