"""The one training loop and the one inference loop. They know the contract, neither the models nor AnnData."""
