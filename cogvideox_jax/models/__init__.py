"""One file, one network and its preset table."""
