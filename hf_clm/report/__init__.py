"""A run as one page that opens from disk, and runs side by side: from the files of their folders alone."""
