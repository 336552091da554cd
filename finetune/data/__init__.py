"""Training data: files (sources), texts (reading), token ids (tokens), rows (packing), stored or streamed."""
