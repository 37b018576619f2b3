"""Accuracy on clips against the split of a total of vision tokens over frames."""
