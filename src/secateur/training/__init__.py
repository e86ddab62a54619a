"""Fine-tuning of a pruned model that ends with every zero kept: in a plain loop, in a Trainer, or by merging a LoRA."""
