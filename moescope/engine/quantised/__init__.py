"""Quantised weights: which tensors of a checkpoint are packed, and what numbers they stand for.

numpy only, so that every interpreter can use it. What goes where in the decoder is `families`'.
"""
