"""Measure what a recipe costs in quality."""
