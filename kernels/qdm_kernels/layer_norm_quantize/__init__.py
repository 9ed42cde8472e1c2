"""LayerNorm, the modulation of adaptive norms, and quantization in one pass."""
