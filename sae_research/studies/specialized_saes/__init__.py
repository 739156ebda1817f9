"""Study 3: specialized SAEs by retrieval and tilted risk (arXiv 2411.00743); to come."""
