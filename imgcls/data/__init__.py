"""Where examples come from, in which order, and decoded once."""
