"""One page and one model card from run folders and evaluations."""
