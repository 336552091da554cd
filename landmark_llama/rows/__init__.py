"""What a call brings: rows, laid out with their landmarks, documents packed into them, and the checks of both."""
