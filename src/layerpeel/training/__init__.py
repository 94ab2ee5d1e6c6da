"""Training a student that shares the weights of its teacher."""
