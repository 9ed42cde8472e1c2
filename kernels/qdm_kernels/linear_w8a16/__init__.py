"""Linear layer with float activations and int8 weights."""
