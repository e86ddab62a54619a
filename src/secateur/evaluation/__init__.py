"""How good a model is: perplexity, divergence from the dense model, zero-shot tasks."""
