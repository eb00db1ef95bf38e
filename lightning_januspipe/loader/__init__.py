"""The user's DataLoader, giving micro-batches."""
