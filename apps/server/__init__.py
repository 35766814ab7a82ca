"""`textcond serve`: embeddings and search over HTTP, for many clients at once."""
