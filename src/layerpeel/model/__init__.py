"""A causal language model: where its layers are, how it runs them, loading, shortening and saving it."""
