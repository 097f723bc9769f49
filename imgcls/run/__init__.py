"""What keeps a run safe: checkpoints, logs, signals, processes. Knows nothing of learning."""
