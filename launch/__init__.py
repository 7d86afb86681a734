"""Starting runs on more than one process."""
