"""Methods and repairs that look at data, and the statistics they need."""
