"""Files and folders of weights: written atomically, sharded over ranks, exported, mapped into memory."""
