"""Schedules runs side by side, launches them as processes, reads their records and reports; holds no model."""
