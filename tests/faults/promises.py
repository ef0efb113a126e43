"""All promises: the short ones run in `make test`, all in `make test-slow`."""

import damage_promises
import kill_promises
import process_promises
from promise import PROMISES, Promise, table

# Importing the modules puts their promises on the list.
MODULES = (kill_promises, damage_promises, process_promises)

__all__ = ["MODULES", "PROMISES", "Promise", "table"]
