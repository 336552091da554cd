"""Training data: from files to rows."""
