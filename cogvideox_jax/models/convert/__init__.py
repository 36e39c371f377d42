"""Names and layouts of other systems' files: one table per network, read in both directions."""
