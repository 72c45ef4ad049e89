"""Where requests go and what goes over the wire."""
