"""Making it small: pruning, quantization and distillation."""
