"""The one exception that is meant for the reader of a notebook or a terminal."""


class ResearchError(Exception):
    """One sentence that says what is wrong and what to do; the command line prints it and exits with 1."""
