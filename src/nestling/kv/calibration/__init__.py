"""Bases and costs, measured on a model."""
