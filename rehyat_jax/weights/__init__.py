"""The engine of checkpoints: tables of names, load plans, files; it knows no network (see `models.checkpoints`)."""
