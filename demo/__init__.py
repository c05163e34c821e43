"""What exists only because you have no GPU: a drawn world, a tiny base model, and the ablation on them."""
