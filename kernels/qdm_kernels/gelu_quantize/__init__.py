"""GELU, or the gated GELU of GEGLU, and quantization in one pass."""
