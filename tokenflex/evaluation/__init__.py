"""Accuracy at every vision-token count, on any data that training reads."""

from tokenflex.evaluation.counts import CountSelector
from tokenflex.evaluation.runner import evaluate

__all__ = ["CountSelector", "evaluate"]
