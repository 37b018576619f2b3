"""What each op means, in plain PyTorch: runs and trains anywhere, and in float64 it is the truth.

Functions here take arguments that the public op has already checked.
"""
