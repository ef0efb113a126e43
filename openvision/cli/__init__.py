"""The command line: one thin file per command. May import everything; imports it when a command runs."""
