"""Text and examples to batches: sources, tokenizer, packed arrays, loader, in this order."""
