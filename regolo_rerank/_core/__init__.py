"""One call, from texts to a ranking: what is sent, when it is sent again, and who sends it."""
