"""Study 5: safety fine-tuning in an SAE-built subspace (arXiv 2512.23260); to come."""
