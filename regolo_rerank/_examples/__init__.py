"""Real data to try things on."""
