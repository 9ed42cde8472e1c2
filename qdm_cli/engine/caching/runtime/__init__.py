"""Runs a denoiser along a cache schedule: cuts, split forwards, and the context manager that follows the sampler."""

from qdm_cli.engine.caching.runtime.split import SplitDenoiser, candidate_cuts, find_cut

__all__ = ["SplitDenoiser", "candidate_cuts", "find_cut"]
