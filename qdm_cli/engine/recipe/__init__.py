"""Recipes: schema, loading with positions, overrides."""

from qdm_cli.engine.recipe.dump import dump_resolved, recipe_digest
from qdm_cli.engine.recipe.load import LoadedRecipe, load_recipe
from qdm_cli.engine.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "dump_resolved", "load_recipe", "recipe_digest"]
