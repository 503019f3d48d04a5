"""What the commands do; the command line itself is `cli.py`."""
