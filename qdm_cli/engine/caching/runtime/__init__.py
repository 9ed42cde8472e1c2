"""Runs a denoiser along a cache schedule: cuts, split forwards, and the context manager that follows the sampler."""

from qdm_cli.engine.caching.runtime.apply import cached, with_corrections
from qdm_cli.engine.caching.runtime.cache import Cache, active_cache
from qdm_cli.engine.caching.runtime.split import SplitDenoiser, candidate_cuts, find_cut

__all__ = ["Cache", "SplitDenoiser", "active_cache", "cached", "candidate_cuts", "find_cut", "with_corrections"]
