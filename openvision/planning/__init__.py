"""Plan compute, memory, time and cost of a recipe on given devices. May import `recipe`, `models`, `objectives`."""
