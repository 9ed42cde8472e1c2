"""What the Triton matrix products share: device functions, tile shapes, measured configurations."""
