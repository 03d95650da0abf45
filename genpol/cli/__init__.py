"""The `genpol` command: one module per subcommand."""
