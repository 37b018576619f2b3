"""Training: a configuration, a loop, and checkpoints that survive a killed run."""
