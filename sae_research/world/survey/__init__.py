"""The toy survey model: its planted population, prompts, training and checks."""
