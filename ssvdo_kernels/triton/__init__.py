"""Triton kernels of the token path and how they are launched."""
