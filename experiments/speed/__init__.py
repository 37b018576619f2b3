"""Studies of speed: the cost of vision tokens in whole models, in training and in answers."""
