"""Looking into a trained model: which slots each token reads, what the reads add, and what is left without them."""
