"""Usage of slots: counters of which slots are read, figures over them, and revival of slots that are never read."""
