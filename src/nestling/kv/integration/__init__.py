"""Which models are served, and what transformers calls."""
