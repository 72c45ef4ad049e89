"""One call, from texts to a ranking: what is sent, what a reply means, and who sends it."""
