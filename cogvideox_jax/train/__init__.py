"""The nouns of every training stage: state, optimizer, checkpoint, metrics. They know no model."""
