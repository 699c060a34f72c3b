"""What every size is worth."""
