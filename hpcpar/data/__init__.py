"""Text: tokenizer, token store, and the order of samples as a pure function of (seed, global sample index)."""
