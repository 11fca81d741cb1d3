"""The engine measures its own model once its weights are loaded, and makes the recipe that it runs."""
