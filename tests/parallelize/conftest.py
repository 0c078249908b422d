"""Tracing is what these tests do most: torch's structured trace log, which pytest would capture, is kept out of it."""

import logging

logging.getLogger("torch.__trace").propagate = False
