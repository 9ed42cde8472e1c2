"""Weight-only linear layers of few rows, bound by the bytes of their weights."""
