"""What follows the integer sums of a layer: activation, residual, output type (README: Epilogue)."""
