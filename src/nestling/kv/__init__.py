"""The cache wing: nested bases for keys and values, and a cache that stores their first coordinates."""
