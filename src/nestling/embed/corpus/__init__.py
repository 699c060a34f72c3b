"""Vectors of a whole corpus in files: every size from one forward, by shards that survive a kill."""
