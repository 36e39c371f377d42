"""Pure functions of arrays: no Flax, no mesh, no I/O."""
