"""Search: plans and indexes."""
