"""Long jobs that survive a kill: checkpoints, results, progress."""
