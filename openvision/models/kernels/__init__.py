"""Fast implementations of the operations a step spends its time in, chosen by one dispatch."""
