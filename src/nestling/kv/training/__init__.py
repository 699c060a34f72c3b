"""Training of bases by distillation."""
