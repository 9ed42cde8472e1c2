"""Integer kernels of qdm: one packing layout, one backend chooser, one folder per op. Importing it touches no device."""

__all__ = ["backend", "layout"]
