"""Linear layer with int8 activations and int4 weights."""
