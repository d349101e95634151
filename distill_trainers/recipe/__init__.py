"""Recipes: YAML files and command lines, read and checked before anything is loaded."""
