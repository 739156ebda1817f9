"""Choosing text of a subdomain from a large pool by a few seed documents."""
