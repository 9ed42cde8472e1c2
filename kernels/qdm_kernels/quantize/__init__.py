"""Float activations to signed int8 codes: static per tensor, dynamic per token."""
