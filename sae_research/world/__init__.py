"""The embedded world: small language models whose texts, and so whose concepts, are known exactly."""
