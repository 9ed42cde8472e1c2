"""2-D convolution on signed int8 activation and weight codes."""
