"""Search in two steps: a prefix of the vectors finds candidates, the full vectors rank them."""
