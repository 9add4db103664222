"""Triton kernels, for CUDA and for ROCm through it: arrays in, arrays out.

Every kernel has a slow twin in numpy or torch and is compared with it under Triton's interpreter.
A module's `AOT` lists specialisations that the tests compile for a device without having one.
"""
