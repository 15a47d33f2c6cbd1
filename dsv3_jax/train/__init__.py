"""Training: losses, optimizer, schedules, the step, and the run around it."""
