"""Signatures of the commands; the work is in `commands`."""
