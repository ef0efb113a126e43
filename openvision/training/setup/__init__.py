"""Making the model of a run: build, initialise, warm-start, compile, distribute over processes."""
