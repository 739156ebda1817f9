"""Study 4: MetaSAEs with a decomposability penalty (arXiv 2604.03436); to come."""
