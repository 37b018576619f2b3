"""Training and evaluation data: samples in, packed batches out."""
