"""The run around the steps: its folder, sessions, log, trackers, throughput, signals and watchdog."""
