"""nestling: one model, every size."""
