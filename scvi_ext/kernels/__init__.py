"""Fused count losses and sparse products: forward and gradient in one pass."""
