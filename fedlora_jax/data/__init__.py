"""Data: sources (embedded and TFDS), partitions over clients, and batches on the device."""
