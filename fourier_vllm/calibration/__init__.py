"""Measure a model and spend the bits of a page where they matter."""
