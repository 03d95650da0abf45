"""Networks, embeddings and normalisers that every policy is built from."""
