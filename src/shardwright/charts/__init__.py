"""Every picture the package draws, one file a kind; matplotlib is imported when one is drawn."""
