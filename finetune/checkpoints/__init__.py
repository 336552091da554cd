"""What a run saves, and what it may resume from."""
