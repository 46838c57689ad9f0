"""Files to batches: labels, data sets, augmentation, loader."""
