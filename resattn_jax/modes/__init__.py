"""What the command line can do: a module a mode, each with `run(command)`."""
