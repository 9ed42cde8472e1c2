"""Loops in C++ for CPUs, compiled for the machine at hand on first use where it has a compiler; without one, torch's operators serve."""
