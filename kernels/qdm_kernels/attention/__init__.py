"""Attention without mask for long sequences on CPUs with native bfloat16."""
