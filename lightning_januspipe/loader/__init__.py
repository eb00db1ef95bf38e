"""Makes the user's DataLoader give micro-batches."""
