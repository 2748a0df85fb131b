"""From a file on disk, or a Hub row, to packed rows and batches."""
