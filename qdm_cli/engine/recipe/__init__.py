"""Recipes: schema, loading with positions, overrides."""

from qdm_cli.engine.recipe.schema import Recipe

__all__ = ["Recipe"]
