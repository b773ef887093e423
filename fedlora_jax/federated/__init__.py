"""Local training, one round, and the loop of an experiment."""
