"""Fused count losses, products with sparse and with dense rows, hidden layers, the latent variable, and Adam."""
