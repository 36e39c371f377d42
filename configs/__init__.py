"""One file describes one stage of one run; its docstring says how to run it."""
