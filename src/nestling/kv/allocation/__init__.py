"""Budgets, and how the coordinates and bits of a budget are shared out."""
