"""Cards: what a model or a dataset says of itself on the Hub."""
