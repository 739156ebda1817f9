"""One module per paper: settings and pure functions; no plotting, no paths."""
