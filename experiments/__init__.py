"""One file, one result: `python -m experiments.<name> [--smoke]`."""
