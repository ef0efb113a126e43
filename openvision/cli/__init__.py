"""Command line: one thin file per command. May import every folder, and does so when a command runs."""
