"""What a run or a scoring found, as a page, pictures, tables and model cards."""
