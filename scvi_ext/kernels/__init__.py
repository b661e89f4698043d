"""Fused count losses, with all gradients in one pass, products with sparse and with dense rows, and Adam."""
