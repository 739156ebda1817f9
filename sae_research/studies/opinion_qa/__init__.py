"""Study 1: a sparse shift in SAE space makes a frozen model answer as a demographic group does."""
