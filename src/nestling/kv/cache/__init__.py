"""The cache: what is stored of each token, and how attention reads it."""
