"""Vector stores as engines of `nestling.embed.search`: a file each."""
