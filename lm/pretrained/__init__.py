"""Models of other people: their weights, their tokenizers, and the same for ours."""
