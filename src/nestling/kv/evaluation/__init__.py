"""What a cache costs in quality, and in bytes."""
