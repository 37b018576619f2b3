"""The Triton kernels of the projector; importing anything here imports Triton.

One file for each stage, to be read from top to bottom: the maths, the memory traffic, the kernel,
and the function that launches it on tensors that are already checked.
"""
