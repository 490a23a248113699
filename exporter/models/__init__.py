"""Built-in models and the lookup of a user's own."""
