"""The parts of a run: data, and the model built, initialised, warm-started, compiled and distributed."""
