"""Training: from labelled faces to the members of an ensemble."""
