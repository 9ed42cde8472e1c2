"""What a recipe would do, computed without weights: layers, bits, bytes, denoiser calls, memory, what is missing, what will fail."""

from qdm_cli.engine.plan.make import Plan, make_plan, rule_hits

__all__ = ["Plan", "make_plan", "rule_hits"]
