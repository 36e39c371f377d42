"""Small Flax modules that know no model."""
