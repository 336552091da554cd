"""Reading texts into a saved memory, asking it, and seeing what was read: what the commands of these names do."""
