"""Vectors of a whole corpus."""
