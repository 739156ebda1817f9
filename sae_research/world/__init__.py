"""The synthetic testbed: small language models whose texts, and so whose concepts, are known."""
