"""GroupNorm, SiLU and quantization, channels last."""
