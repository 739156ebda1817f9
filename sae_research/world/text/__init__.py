"""The toy text model: its generators with known truth, training, checks and demo."""
