"""Exit codes of `tenfold`."""

NO_RESULT, BAD_INPUT, INTERRUPTED = 1, 2, 130
SIGNALLED = 128
"""Plus the number of the signal that ended the command; INTERRUPTED is SIGINT's."""
