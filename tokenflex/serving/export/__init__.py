"""Export: a model as graphs for other runtimes, or its language model alone."""
