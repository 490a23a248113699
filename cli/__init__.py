"""The `frostline` command."""
