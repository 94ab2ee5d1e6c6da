"""Text in any form that a user has, to batches of tokens."""
