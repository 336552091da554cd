"""Reading through the cache: groups of queries, the blocks they choose, the table they attend to, the cache."""
