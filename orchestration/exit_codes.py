"""Exit codes of `tenfold`."""

NO_RESULT, BAD_INPUT, INTERRUPTED = 1, 2, 130
