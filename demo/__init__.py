"""What exists only because you have no GPU: a drawn world, a tiny base model, the ablation."""
