"""The task: ARC-AGI sources, their serialisation, augmentation, batches, decoding, voting and submission."""
