"""Linear layer with float activations and int4 weights, one scale per output or per group of inputs."""
