"""What the adapters for frameworks share."""
