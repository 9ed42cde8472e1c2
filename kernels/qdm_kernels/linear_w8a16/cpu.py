"""Weight-only linear layer on CPUs: weights are expanded to float32 once, at load."""

from qdm_kernels.linear_w4a16.cpu import State, linear, prepare

__all__ = ["State", "linear", "prepare"]
