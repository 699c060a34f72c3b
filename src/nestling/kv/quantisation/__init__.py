"""Codes of few bits, packed, and the kernels that read them."""
