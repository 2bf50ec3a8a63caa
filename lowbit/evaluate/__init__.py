"""Text, perplexity, tables, figures, sizes, and the fake-quantized twin of a packed model."""
