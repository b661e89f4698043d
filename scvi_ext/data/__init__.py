"""From an AnnData to tensors."""
