"""Compression simulated by masks, with gradients."""
