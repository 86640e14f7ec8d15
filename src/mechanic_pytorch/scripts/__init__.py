"""Someone else's training script, unchanged: `patched`, and the command `mechanic run` with its report."""
