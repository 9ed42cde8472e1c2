"""Shipped recipes, installed as `qdm_cli.recipes`."""
