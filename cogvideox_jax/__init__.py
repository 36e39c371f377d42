"""Train CogVideoX (arXiv 2408.06072) in JAX, from raw videos to generated ones. WORKSPACE.md is the map of the rooms."""
