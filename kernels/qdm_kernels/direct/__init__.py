"""Launches of compiled kernels past triton's own launcher."""
