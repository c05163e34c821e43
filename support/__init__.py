"""What a run stands on: it knows no equation and no task, and imports nothing above it."""
