"""What a recipe computes, holds in memory and costs on given devices. May import `recipe`, `models`, `objectives`."""
