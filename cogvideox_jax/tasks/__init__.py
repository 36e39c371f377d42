"""One file, one thing a user runs: `check(config, workdir)` refuses bad input, `run(config, workdir)` does the work."""
