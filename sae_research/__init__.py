"""Reproducible research on language models through sparse autoencoders."""
