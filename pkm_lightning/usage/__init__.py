"""Who reads which slots: counters of reads, figures over them, and revival of slots that nobody reads."""
