"""Training of every size at once."""
